// Prefill attention: the warpgroups that multiply. Included by prefill_attention.cu.
#pragma once

#include "prefill_shared.cuh"
#include "wgmma.cuh"

// Never stores (no sum of weights is negative): makes what follows wait for `value`. The assembler would otherwise move
// its computation behind the next wgmma_wait, and nothing would run under the products that this waits for.
__device__ __forceinline__ void keep_before(float value) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}\n" ::"f"(value),
        "r"(0)
        : "memory");
}

struct Consumer {
    float scale;  // of the scores, times log2(e)
    int warpgroup, warp, lane;
    uint32_t peer;  // `shared` of the CTA of rank `lane`, for lanes below CLUSTER
    Ring k, v;
    int block, first;      // key blocks: the one whose scores were computed last, and the last to come
    int whole, whole_end;  // blocks [whole, whole_end) are seen whole by every row
    // Of this thread's rows lane/4 and lane/4 + 8 of its warp's 16:
    int positions[2];
    float maxima[2];  // scaled, not behind the true ones by more than RAISE
    float sums[2];    // of this thread's columns
    float scores[KEYS / 2];
    float out[HEAD_DIM / 2];
    uint32_t weights[KEYS / 4];  // bf16 pairs, as wgmma takes them

    // scores = Q·Kᵀ of the next key block.
    __device__ __forceinline__ void start_scores(uint32_t q) {
        const uint64_t a = wgmma_operand(q, 0), b = wgmma_operand(shared_address(shared->k[k.slot]), 0);
        wgmma_pin(scores);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; ++step) {
            const int panel = step / 4, column = step % 4 * 32;
            mma_64x128x16(scores, a + (panel * Q_PANEL_BYTES + column) / 16, b + (panel * KV_PANEL_BYTES + column) / 16,
                          step > 0);
        }
        wgmma_commit();
    }

    // out = weights·V (+ out) of the key block whose weights these are.
    __device__ __forceinline__ void start_out(bool accumulate) {
        const uint64_t b = wgmma_operand(shared_address(shared->v[v.slot]), KV_PANEL_BYTES);
        wgmma_pin(out);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step)
            mma_64xNx16(out, &weights[4 * step], b + step * 16 * 128 / 16, accumulate || step > 0);
        wgmma_commit();
    }

    __device__ __forceinline__ void wait_k() { barrier_wait(shared_address(&shared->k_full[k.slot]), k.phase); }
    __device__ __forceinline__ void wait_v() { barrier_wait(shared_address(&shared->v_full[v.slot]), v.phase); }

    // This warp has read a slot: tell every CTA of the cluster, each of which copies a part of a later block to it.
    __device__ __forceinline__ void release(const uint64_t* empty) {
        if (lane < CLUSTER) barrier_arrive_cluster(peer + (shared_address(empty) - shared_address(shared)));
    }
    __device__ __forceinline__ void release_k() {
        release(&shared->k_empty[k.slot]);
        k.advance<K_STAGES>();
    }
    __device__ __forceinline__ void release_v() {
        release(&shared->v_empty[v.slot]);
        v.advance<V_STAGES>();
    }

    // The scale, loaded anew to hold the assembler to this place: a load stays behind the release before it, which
    // would otherwise be left until the softmax is done, and keep the producers waiting.
    __device__ __forceinline__ float load_scale() {
        float value;
        asm volatile("ld.volatile.shared.f32 %0, [%1];"
                     : "=f"(value)
                     : "r"(shared_address(&shared->scale_log2))
                     : "memory");
        return value;
    }

    // Hide keys after each row's own position, and those that its window has left behind.
    __device__ __forceinline__ void mask(int window) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int last = positions[r] - block * KEYS - lane % 4 * 2;
            const int before = window > 0 ? last - window : -KEYS;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (8 * j + e > last || 8 * j + e <= before) scores[4 * j + 2 * r + e] = NEGATIVE_INFINITY;
        }
    }

    // This thread's highest scores of its two rows in the key block's half `half`.
    __device__ __forceinline__ float2 highest(int half) const {
        float tops[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float* row = scores + half * (KEYS / 4) + 2 * r;
            float even = row[0], odd = row[1];
#pragma unroll
            for (int j = 1; j < KEYS / 16; ++j) even = fmaxf(even, row[4 * j]), odd = fmaxf(odd, row[4 * j + 1]);
            tops[r] = fmaxf(even, odd) * scale;
        }
        return make_float2(tops[0], tops[1]);
    }

    // Raise the maxima to those found in half `half`, where they are RAISE higher; what was summed before shrinks.
    __device__ __forceinline__ void raise(float2 top, int half, float (&factors)[2], float (&partial)[4]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float row_top = r ? top.y : top.x;
            row_top = fmaxf(row_top, __shfl_xor_sync(0xFFFFFFFF, row_top, 1));
            row_top = fmaxf(row_top, __shfl_xor_sync(0xFFFFFFFF, row_top, 2));
            const bool rises = row_top > maxima[r] + RAISE;
            const float factor = rises ? exp2_approximate(maxima[r] - row_top) : 1.0f;
            if (rises) maxima[r] = row_top;
            factors[r] *= factor;
            partial[2 * r] *= factor, partial[2 * r + 1] *= factor;
            if (half == 0) continue;
#pragma unroll
            for (int i = 2 * r; i < KEYS / 4; i += 4) scores[i] *= factor, scores[i + 1] *= factor;
        }
    }

    // scores → weights in fp32, added to the sums; returns by what earlier outputs have to be multiplied. The maxima
    // of the second half of the block are found while the exponentials of the first half are computed.
    __device__ __forceinline__ float2 softmax() {
        float factors[2] = {1.0f, 1.0f}, partial[4] = {sums[0], 0.0f, sums[1], 0.0f};
        float2 top = highest(0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (__any_sync(0xFFFFFFFF, top.x > maxima[0] + RAISE || top.y > maxima[1] + RAISE))
                raise(top, half, factors, partial);
            if (half == 0) top = highest(1);
#pragma unroll
            for (int i = half * (KEYS / 4); i < (half + 1) * (KEYS / 4); ++i) {
                scores[i] = exp2_approximate(fmaf(scores[i], scale, -maxima[i / 2 % 2]));
                partial[i % 4] += scores[i];
            }
        }
        sums[0] = partial[0] + partial[1];
        sums[1] = partial[2] + partial[3];
        return make_float2(factors[0], factors[1]);
    }

    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
    }

    __device__ __forceinline__ void rescale(float upper, float lower) {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; ++i) {
            out[4 * i] *= upper, out[4 * i + 1] *= upper;
            out[4 * i + 2] *= lower, out[4 * i + 3] *= lower;
        }
    }

    __device__ __forceinline__ uint32_t queries(int slot) const {
        return shared_address(shared->q[slot]) + warpgroup * 64 * 128;
    }

    // Take up the item in `slot`.
    __device__ __forceinline__ void begin(int slot, const Group& group, int window) {
        const Item& item = shared->item[slot];
        const Part part(item, group);
        const int row = warpgroup * 64 + warp * 16 + lane / 4;
        positions[0] = part.position + group.token(row);
        positions[1] = part.position + group.token(row + 8);
        maxima[0] = maxima[1] = -1e30f;  // finite: a row may see none of the last block
        sums[0] = sums[1] = 0.0f;
        block = last_block(item);
        first = first_block(item, window);
        whole_end = (part.position + 1) / KEYS;
        whole = window > 0 ? (max(0, part.position + part.tokens - window) + KEYS - 1) / KEYS : 0;
    }

    // The tensor cores' work of one turn: scores of a block, and weights·V of the block before. The softmax that
    // follows runs under the latter, and under the turns of the other warpgroups, which come once ours is issued.
    __device__ __forceinline__ void take_turn(uint32_t q, bool accumulate) {
        wait_k();
        named_barrier_sync(TURN_BARRIER + warpgroup, 256);
        start_scores(q);
        wait_v();
        start_out(accumulate);
        named_barrier_arrive(TURN_BARRIER + (warpgroup + 1 == WARPGROUPS ? 0 : warpgroup + 1), 256);
        wgmma_wait<1>();
        wgmma_pin(scores);
        release_k();
        scale = load_scale();
    }

    // Wait for the end of weights·V; the scores must have become weights by then.
    __device__ __forceinline__ void end_turn() {
        keep_before(sums[0] + sums[1]);
        wgmma_wait<0>();
        wgmma_pin(out);
        wgmma_pin(scores);
        release_v();
        round_weights();
    }

    template <bool MASK>
    __device__ __forceinline__ void step(uint32_t q, int window, bool accumulate) {
        take_turn(q, accumulate);
        if (MASK) mask(window);
        const float2 factors = softmax();
        end_turn();
        if (__any_sync(0xFFFFFFFF, factors.x != 1.0f || factors.y != 1.0f)) rescale(factors.x, factors.y);
    }

    // All items, one after the other without a pause: the first scores of one are computed under the last output of
    // the one before.
    __device__ __forceinline__ void run(uint8_t* target, int num_kv_heads, const Group& group, int window) {
        Ring items;
        barrier_wait(shared_address(&shared->q_full[items.slot]), items.phase);
        if (shared->item[items.slot].tokens == 0) return;
        begin(items.slot, group, window);
        wait_k();
        start_scores(queries(items.slot));
        wgmma_wait<0>();
        wgmma_pin(scores);
        release_k();
        mask(window);
        softmax();
        round_weights();
        bool accumulate = false;
        while (true) {
            if (--block >= first) {
                if (block < whole || block >= whole_end)
                    step<true>(queries(items.slot), window, accumulate);
                else
                    step<false>(queries(items.slot), window, accumulate);
                accumulate = true;
                continue;
            }
            const int ended = items.slot;
            items.advance<2>();
            barrier_wait(shared_address(&shared->q_full[items.slot]), items.phase);
            if (shared->item[items.slot].tokens == 0) {
                wait_v();
                start_out(accumulate);
                wgmma_wait<0>();
                wgmma_pin(out);
                store(target, num_kv_heads, group, ended, sums[0], sums[1]);
                return;
            }
            take_turn(queries(items.slot), accumulate);
            const float upper_sum = sums[0], lower_sum = sums[1];
            begin(items.slot, group, window);
            mask(window);
            softmax();
            end_turn();
            store(target, num_kv_heads, group, ended, upper_sum, lower_sum);
            accumulate = false;
        }
    }

    // Divide the output of the item in `slot` by its sums of weights and write this warp's 16 rows, through its part of
    // the query tile, which has been read for the last time.
    __device__ __forceinline__ void store(uint8_t* target, int num_kv_heads, const Group& group, int slot,
                                          float upper_sum, float lower_sum) {
        float sums[2] = {upper_sum, lower_sum};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sums[r] += __shfl_xor_sync(0xFFFFFFFF, sums[r], 1);
            sums[r] += __shfl_xor_sync(0xFFFFFFFF, sums[r], 2);
        }
        rescale(1.0f / sums[0], 1.0f / sums[1]);
        // What follows from it is not worked out earlier and kept in registers.
        const int lane = kept(uint32_t(this->lane)), row = warp * 16 + lane % 16;
        const uint32_t q = queries(slot);
        named_barrier_sync(WARPGROUP_BARRIER + warpgroup, 128);  // all four warps' products have ended
#pragma unroll
        for (int pair = 0; pair < HEAD_DIM / 16; ++pair) {
            const int chunk = 2 * pair + lane / 16;
            uint32_t values[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] = pack_bf16(out[8 * pair + 2 * i], out[8 * pair + 2 * i + 1]);
            store_matrices(q + chunk / 8 * Q_PANEL_BYTES + row * 128 + ((chunk ^ row) & 7) * 16, values);
        }
        __syncwarp();
        const Item& item = shared->item[slot];
        const Part part(item, group);
        const int64_t row_bytes = int64_t(num_kv_heads) * group.size * (HEAD_DIM * 2);
        target += part.row * row_bytes + item.head * group.size * (HEAD_DIM * 2);
        constexpr int CHUNKS = HEAD_DIM / 8;
        const int chunk = lane % CHUNKS;
#pragma unroll
        for (int i = 0; i < 16; i += 32 / CHUNKS) {
            const int own = warp * 16 + i + lane / CHUNKS, in_cta = warpgroup * 64 + own;
            const int token = group.token(in_cta), head = in_cta - token * group.size;
            if (token < part.tokens)
                *reinterpret_cast<uint4*>(target + token * row_bytes + head * (HEAD_DIM * 2) + chunk * 16) =
                    load_shared_16(q + chunk / 8 * Q_PANEL_BYTES + own * 128 + ((chunk ^ own) & 7) * 16);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive_cluster(cluster_address(shared_address(&shared->item_empty[slot]), 0));
    }
};

__device__ __forceinline__ void consume(uint8_t* out, int num_kv_heads, const Group& group, int window) {
    const int thread = threadIdx.x - 128;
    Consumer consumer;
    consumer.scale = consumer.load_scale();
    consumer.warpgroup = __shfl_sync(0xFFFFFFFF, thread / 128, 0);
    consumer.warp = __shfl_sync(0xFFFFFFFF, thread / 32 % 4, 0);
    consumer.lane = thread % 32;
    consumer.peer = cluster_address(shared_address(shared), consumer.lane % CLUSTER);
    if (consumer.warpgroup == WARPGROUPS - 1) named_barrier_arrive(TURN_BARRIER, 256);  // warpgroup 0 begins
    consumer.run(out, num_kv_heads, group, window);
}
