// Tokens → rows sorted by expert, for the grouped GEMM. See moe.py for the arrays.
//
// The rows of an expert are in the order of their tokens and begin at a multiple of TILE_ROWS, so that a tile of the GEMM
// has one expert. Every CTA counts for itself how many choices of each expert there are in all, and how many before its own
// tokens: they are a few thousand integers, cheaper to read again than to wait for another kernel's sums.
//
// Rows between experts become zero: the GEMM multiplies them like others, but products with zero take little power, and
// power is what limits its clock.
//
// Configuration: TILE_ROWS, THREADS.
#include "memory.cuh"
#include "reduce.cuh"

constexpr int MAX_EXPERTS = 64;  // two per lane of a warp
constexpr int COUNTED = 8;       // choices of a thread in flight while it counts
constexpr int COPIED = 4;        // vectors of a thread in flight while it copies

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) moe_permute(
    const uint4* normed,  // [*, vectors]
    const int* experts,   // [*, top_k]
    uint4* permuted,      // [rows, vectors]
    int* places,          // [*, top_k] row of `permuted` of each choice
    int* tile_experts,    // expert of each TILE_ROWS rows of `permuted`
    int* num_rows,        // [1] rows of `permuted` that are used, a multiple of TILE_ROWS
    const int* count,     // [1] tokens there are
    int start,
    int stop,
    int vectors,
    int num_experts,
    int top_k,
    int tokens) {         // per CTA; tokens · top_k ≤ 32
    __shared__ int chosen[2][MAX_EXPERTS];  // how often, by the tokens of earlier CTAs and by all others
    __shared__ int first_row[MAX_EXPERTS + 1];
    __shared__ int place_of[32];
    for (int i = threadIdx.x; i < 2 * MAX_EXPERTS; i += THREADS) chosen[0][i] = 0;
    grid_dependency_launch();
    grid_dependency_wait();
    const int own = blockIdx.x * tokens;  // first token, from `start`
    const int all = min(stop, *count) - start;
    __syncthreads();

    const int* const choices = experts + static_cast<int64_t>(start) * top_k;
    const int earlier = own * top_k, num_choices = all * top_k;
    for (int first = threadIdx.x; first < num_choices; first += COUNTED * THREADS) {
        int expert[COUNTED];
#pragma unroll
        for (int i = 0; i < COUNTED; ++i)
            if (first + i * THREADS < num_choices) expert[i] = choices[first + i * THREADS];
#pragma unroll
        for (int i = 0; i < COUNTED; ++i) {
            const int at = first + i * THREADS;
            if (at < num_choices) atomicAdd(&chosen[at >= earlier][expert[i]], 1);
        }
    }
    __syncthreads();

    const int own_choices = max(0, min(tokens, all - own)) * top_k;
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        int tiles[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            tiles[i] = (chosen[0][2 * lane + i] + chosen[1][2 * lane + i] + TILE_ROWS - 1) / TILE_ROWS;
        const int until = scan_lanes(tiles[0] + tiles[1]);
        first_row[2 * lane + 1] = (until - tiles[1]) * TILE_ROWS;
        first_row[2 * lane + 2] = until * TILE_ROWS;
        if (lane == 0) first_row[0] = 0;
        __syncwarp();
        const int expert = lane < own_choices ? choices[earlier + lane] : -1;
        const uint32_t same = __match_any_sync(~0u, expert);
        if (expert >= 0) {
            const int place = first_row[expert] + chosen[0][expert] + __popc(same & ((1u << lane) - 1));
            place_of[lane] = place;
            places[static_cast<int64_t>(start) * top_k + earlier + lane] = place;
        }
    }
    __syncthreads();

    if (blockIdx.x == 0) {
        const int rows = first_row[num_experts];
        if (threadIdx.x == 0) *num_rows = rows;
        for (int tile = threadIdx.x; tile < rows / TILE_ROWS; tile += THREADS) {
            int expert = 0;
            while (first_row[expert + 1] <= tile * TILE_ROWS) ++expert;
            tile_experts[tile] = expert;
        }
    }

    for (int expert = 0; expert < num_experts; ++expert) {
        const int end = first_row[expert + 1];
        for (int row = first_row[expert] + chosen[0][expert] + chosen[1][expert] + blockIdx.x; row < end; row += gridDim.x)
            for (int at = threadIdx.x; at < vectors; at += THREADS)
                permuted[static_cast<int64_t>(row) * vectors + at] = uint4{};
    }

    const int own_vectors = own_choices / top_k * vectors;
    const uint4* const source = normed + static_cast<int64_t>(start + own) * vectors;
    for (int first = threadIdx.x; first < own_vectors; first += COPIED * THREADS) {
        uint4 x[COPIED];
#pragma unroll
        for (int i = 0; i < COPIED; ++i)
            if (first + i * THREADS < own_vectors) x[i] = load_16(source + first + i * THREADS);
#pragma unroll
        for (int i = 0; i < COPIED; ++i) {
            const int at = first + i * THREADS;
            if (at >= own_vectors) break;
            const int token = at / vectors, column = at - token * vectors;
            for (int j = 0; j < top_k; ++j)
                permuted[static_cast<int64_t>(place_of[token * top_k + j]) * vectors + column] = x[i];
        }
    }
}
