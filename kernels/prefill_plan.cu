// Cuts the prefill rows of a range into tiles, once per step; see prefill_plan.cuh. A warp per sequence.
#include "hopper.cuh"
#include "prefill_plan.cuh"

constexpr int THREADS = 256;

// The rows of a sequence that lie in the range.
struct Rows {
    int begin, tokens, tiles;
    int position;  // of the first row
    int keys;      // that its last row sees

    __device__ __forceinline__ Rows(const int* qo_indptr, const int* kv_lens, int sequence, int start, int stop,
                                    int tile_tokens) {
        const int end = qo_indptr[sequence + 1];
        begin = max(qo_indptr[sequence], start);
        tokens = max(0, min(end, stop) - begin);
        tiles = (tokens + tile_tokens - 1) / tile_tokens;
        position = kv_lens[sequence] - (end - begin);
        keys = position + tokens;
    }
};

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    prefill_plan(const int* qo_indptr, const int* kv_lens, const int* kv_indptr, const int* num_decode,
                 const int* num_seqs, Plan* plan, int start, int stop, int tile_tokens) {
    grid_dependency_wait();
    grid_dependency_launch();
    const int lane = threadIdx.x % 32, warps = gridDim.x * (THREADS / 32);
    const int first = *num_decode, last = *num_seqs;  // a decoding sequence has one row
    Tile* tiles = reinterpret_cast<Tile*>(plan + 1);
    const auto rows_of = [=](int sequence) {
        return Rows(qo_indptr, kv_lens, sequence, start, stop, tile_tokens);
    };
    const int warp = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    for (int sequence = first + warp; sequence < last; sequence += warps) {
        const Rows own = rows_of(sequence);
        int before = 0;  // tiles of the sequences that come first
        for (int other = first + lane; other < last; other += 32) {
            const Rows rows = rows_of(other);
            if (rows.keys > own.keys || (rows.keys == own.keys && other < sequence)) before += rows.tiles;
        }
        before = warp_sum(before);
        for (int i = lane; i < own.tiles; i += 32) {
            const int skipped = (own.tiles - 1 - i) * tile_tokens;
            tiles[before + i] = {own.begin + skipped,
                                 min(tile_tokens, own.tokens - skipped),
                                 own.position + skipped,
                                 kv_indptr[sequence],
                                 before,
                                 own.tiles,
                                 {}};
        }
    }
    if (warp == 0) {
        int all = 0;
        for (int sequence = first + lane; sequence < last; sequence += 32) all += rows_of(sequence).tiles;
        all = warp_sum(all);
        if (lane == 0) plan->num_tiles = all, plan->taken = 0;
    }
}
