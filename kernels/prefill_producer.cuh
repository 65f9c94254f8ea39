// Prefill attention: the producer warps. Included by prefill_attention.cu.
#pragma once

#include "prefill_shared.cuh"

__device__ __forceinline__ void copy_16_async(uint32_t target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(__cvta_generic_to_global(source))
                 : "memory");
}

__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void clear_shared_16(uint32_t target) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(target), "r"(0) : "memory");
}

// ---- Producer warp 0 of the cluster's first CTA: takes items and hands them to every CTA ----

__device__ __forceinline__ void produce_items(Plan* plan, int num_kv_heads) {
    const int lane = threadIdx.x;
    const Tile* tiles = reinterpret_cast<const Tile*>(plan + 1);
    const int num_items = plan->num_tiles * num_kv_heads, clusters = gridDim.x / CLUSTER;
    int item = blockIdx.x / CLUSTER;
    for (Ring ring;; ring.advance<2>()) {
        int4 what = {0, 0, 0, 0};
        int head = 0, next = 0;
        if (item < num_items) {
            if (lane == 0) {
                // One is taken for every item there is, so the last to be taken leaves the counter as it was found.
                const int taken = atomicAdd(&plan->taken, 1);
                if (taken == num_items - 1) plan->taken = 0;
                next = clusters + taken;
            }
            // Items of a sequence: groups of KV heads whose keys fit in L2, in them the tiles, in these the heads.
            const Tile* any = tiles + item / num_kv_heads;
            const int first = any->section, section_tiles = any->section_tiles;
            const int in_section = item - first * num_kv_heads;
            const int keys = tiles[first].position + tiles[first].tokens;
            const int together = max(1, min(L2_BYTES / (keys * (HEAD_DIM * 4)), num_kv_heads));
            const int before = in_section / (section_tiles * together) * together;
            const int heads = min(together, num_kv_heads - before), in_group = in_section - before * section_tiles;
            const int tile = in_group / heads;
            head = before + in_group - tile * heads;
            what = *reinterpret_cast<const int4*>(tiles + first + tile);
        }
        barrier_wait(shared_address(&shared->item_empty[ring.slot]), ring.phase ^ 1);
        if (lane < CLUSTER) {
            const uint32_t target = cluster_address(shared_address(&shared->item[ring.slot]), lane);
            store_cluster(target, what);
            store_cluster(target + 16, {head, 0, 0, 0});
            barrier_arrive_release(cluster_address(shared_address(&shared->item_full[ring.slot]), lane));
        }
        if (item >= num_items) return;
        item = __shfl_sync(0xFFFFFFFF, next, 0);
    }
}

// ---- Producer warps 1 and 2: copy K and V of each item, last key block first ----

// Every CTA of the cluster copies some of a block's pages to all of them; a lane copies one panel of one page.
template <bool IS_V>
__device__ __forceinline__ void produce_kv(const uint8_t* cache, const int* kv_indices, int num_kv_heads,
                                           int page_shift, int window) {
    constexpr int STAGES = IS_V ? V_STAGES : K_STAGES;
    const int lane = threadIdx.x % 32;
    const int cta_pages = (KEYS / CLUSTER) >> page_shift, panel = lane / cta_pages;
    const int row = (cluster_rank() * cta_pages + lane % cta_pages) << page_shift;  // of the block
    const int head_bytes = 2 * PANELS * 128 << page_shift;
    const int64_t page_bytes = int64_t(num_kv_heads) * head_bytes;
    cache += ((IS_V ? PANELS : 0) + panel) * 128 << page_shift;
    Ring ring;
    for (Ring items;; items.advance<2>()) {
        barrier_wait_acquire(shared_address(&shared->item_full[items.slot]), items.phase);
        const Item& item = shared->item[items.slot];
        if (item.tokens == 0) return;
        const int* pages = kv_indices + item.page_begin;
        const uint8_t* head = cache + item.head * head_bytes;
        const int length = item.position + item.tokens, first = first_block(item, window);
        int block = last_block(item), next_page = 0;
        if (block * KEYS + row < length) next_page = pages[block * KEYS + row >> page_shift];
        __syncwarp();  // every lane has read the item: lane 0's last arrival below lets it be overwritten
#pragma unroll 1
        for (; block >= first; --block) {
            const uint8_t* source = head + next_page * page_bytes;
            if (block > first) next_page = pages[(block - 1) * KEYS + row >> page_shift];
            const int valid = min(length - block * KEYS, KEYS), rows = min(valid - row, 1 << page_shift);
            const uint32_t target = shared_address(IS_V ? shared->v[ring.slot] : shared->k[ring.slot]);
            const uint32_t full = shared_address(IS_V ? &shared->v_full[ring.slot] : &shared->k_full[ring.slot]);
            const uint32_t empty = shared_address(IS_V ? &shared->v_empty[ring.slot] : &shared->k_empty[ring.slot]);
            barrier_wait(empty, ring.phase ^ 1);
            // Weights of keys past the end are 0, but 0 · NaN is not: rows of V that are not loaded must hold numbers.
            if (IS_V && valid < KEYS) {
                for (int byte = valid * 128 + lane * 16; byte < KV_PANEL_BYTES; byte += 32 * 16)
                    for (int i = 0; i < PANELS; ++i) clear_shared_16(target + i * KV_PANEL_BYTES + byte);
                async_proxy_fence();
                __syncwarp();
            }
            if (lane == 0) barrier_arrive_expect(full, valid * PANELS * 128);
            __syncwarp();
            if (panel < PANELS && rows > 0)
                bulk_copy_cluster(target + panel * KV_PANEL_BYTES + row * 128, source, rows * 128, full,
                                  (1 << CLUSTER) - 1);
            ring.advance<STAGES>();
        }
    }
}

// ---- Producer warp 3: gathers the query rows of each item into swizzled panels ----

__device__ __forceinline__ void produce_q(const uint8_t* q, int64_t q_stride, const Group& group) {
    constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes in a row
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS, panel = chunk / 8;
    for (Ring items;; items.advance<2>()) {
        barrier_wait_acquire(shared_address(&shared->item_full[items.slot]), items.phase);
        const Item& item = shared->item[items.slot];
        const bool last = item.tokens == 0;  // now: the item may be overwritten once every thread has arrived
        const Part part(item, group);
        const int rows = part.tokens * group.size;
        const uint8_t* source = q + part.row * q_stride + item.head * group.size * (HEAD_DIM * 2) + chunk * 16;
        const uint32_t target = shared_address(shared->q[items.slot]) + panel * Q_PANEL_BYTES;
#pragma unroll 4
        for (int row = lane / CHUNKS; row < rows; row += 32 / CHUNKS) {
            const int token = group.token(row), head = row - token * group.size;
            copy_16_async(target + row * 128 + ((chunk ^ row) & 7) * 16,
                          source + token * q_stride + head * (HEAD_DIM * 2));
        }
        copy_async_wait();
        async_proxy_fence();
        barrier_arrive(shared_address(&shared->q_full[items.slot]));
        if (last) return;
    }
}
