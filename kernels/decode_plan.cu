// Cuts the decode rows of a range into spans of equal price, once per step; see decode_plan.cuh. One CTA.
//
// A tile costs 1, and entering a group `entry_tiles`, which come before the group's first tile. Spans are equal to within
// 1, so that workers (warps) end together whatever the lengths are; if entering cost nothing here, those that have the
// short rows would be last. There are as many spans as workers; of a short line fewer: below `min_tiles` one costs more
// than it saves.
//
// Configuration: THREADS of the CTA, 1024 (a warp sums up the sums of all warps).
#include "decode_plan.cuh"

constexpr int WARPS = THREADS / 32;

struct Row {
    int kv_len, first_tile, tiles;
};

__device__ __forceinline__ Row read_row(const int* kv_lens, int row, int stop, int tile_keys, int window) {
    if (row >= stop) return {0, 0, 0};
    const int kv_len = kv_lens[row];
    const int first = first_key(kv_len, window) / tile_keys;
    return {kv_len, first, (kv_len + tile_keys - 1) / tile_keys - first};
}

__device__ __forceinline__ int group_price(const Row& row, int entry_tiles) {
    return row.tiles ? row.tiles + entry_tiles : 0;
}

__device__ __forceinline__ int warp_inclusive_sum(int value, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// Sum of `value` over the threads up to this one, and over all threads.
__device__ __forceinline__ int inclusive_sum(int value, int* warp_sums, int* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int in_warp = warp_inclusive_sum(value, lane);
    if (lane == 31) warp_sums[warp] = in_warp;
    __syncthreads();
    const int sums = warp_inclusive_sum(warp_sums[lane], lane);
    *total = __shfl_sync(~0u, sums, WARPS - 1);
    const int before = __shfl_sync(~0u, sums, warp - 1);
    __syncthreads();
    return in_warp + (warp ? before : 0);
}

// The last of `count` ascending values that is not above `value`; the first is not.
__device__ __forceinline__ int last_not_above(const int* values, int count, int value) {
    int low = 0;
    while (count - low > 1) {
        const int middle = (low + count) / 2;
        if (values[middle] <= value) {
            low = middle;
        } else {
            count = middle;
        }
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(THREADS) decode_plan(
    const int* kv_lens, const int* kv_indptr, const int* num_decode, void* plan_memory, int first_row, int last_row,
    int num_kv_heads, int tile_keys, int column_blocks, int window, int workers, int min_tiles, int entry_tiles,
    int max_spans) {
    __shared__ int warp_sums[WARPS], merges;
    __shared__ int row_begin[THREADS + 1];  // what all before each row of the chunk at hand costs
    const Plan plan(plan_memory, max_spans);
    const int stop = min(last_row, *num_decode);

    if (threadIdx.x == 0) merges = 0;  // seen by all after the sums below
    int price = 0, sum;
    for (int row = first_row; row < stop; row += THREADS) {
        const Row own = read_row(kv_lens, row + threadIdx.x, stop, tile_keys, window);
        inclusive_sum(group_price(own, entry_tiles), warp_sums, &sum);
        price += sum;
    }
    price *= num_kv_heads;
    const int row_entries = entry_tiles * num_kv_heads;
    const int tiles = price - row_entries * max(0, stop - first_row);  // a decode row has a key at least
    const int spans = tiles ? max(1, min(workers, tiles / min_tiles)) : 0;
    const Cut cut = spans ? Cut{spans, price / spans, price % spans} : Cut{0, 0, 0};

    for (int span = spans + threadIdx.x; span < max_spans; span += THREADS) plan.spans[span] = {};

    int begin = 0;
    for (int chunk = first_row; chunk < stop; chunk += THREADS) {
        const int own = group_price(read_row(kv_lens, chunk + threadIdx.x, stop, tile_keys, window), entry_tiles);
        row_begin[threadIdx.x + 1] = begin + inclusive_sum(own, warp_sums, &sum) * num_kv_heads;
        if (threadIdx.x == 0) row_begin[0] = begin;
        begin += sum * num_kv_heads;
        __syncthreads();
        // The spans that begin in these rows, a thread each.
        int span = cut.span_of(row_begin[0]);
        if (cut.begin(span) < row_begin[0]) ++span;
        for (span += threadIdx.x; span < spans && cut.begin(span) < begin; span += THREADS) {
            const int place = cut.begin(span), i = last_not_above(row_begin, min(THREADS, stop - chunk), place);
            const Row row = read_row(kv_lens, chunk + i, stop, tile_keys, window);
            const int in_row = place - row_begin[i], group = group_price(row, entry_tiles), head = in_row / group;
            const int taken = max(0, in_row - head * group - entry_tiles);  // of this group, by spans before
            const int place_of_tiles = row_begin[i] - row_entries * (chunk + i - first_row) + head * row.tiles + taken;
            plan.spans[span] = {
                chunk + i, head, row.first_tile + taken, 0, row.kv_len, kv_indptr[chunk + i], place_of_tiles, 0};
            const int first_tile = row_begin[i] + head * group + entry_tiles;
            if (taken == 0 || cut.span_of(first_tile) != span - 1) continue;
            // The first cut inside this group.
            const int last = cut.span_of(first_tile + row.tiles - 1);
            const bool few = last - (span - 1) < FEW_PARTS;
            const int count = few ? 1 : column_blocks, index = atomicAdd(&merges, count);
            for (int j = 0; j < count; ++j) {
                plan.merges[index + j] = {chunk + i, head, span - 1, last, few ? ALL_COLUMNS : j, {}};
            }
        }
        __syncthreads();
    }
    for (int span = threadIdx.x; span < spans; span += THREADS) {
        const int end = span + 1 < spans ? plan.spans[span + 1].place : tiles;
        plan.spans[span].tiles = end - plan.spans[span].place;
    }
    if (threadIdx.x == 0) *plan.header = {merges, {}};
}
