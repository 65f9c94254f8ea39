// hidden += Σ_j share_j · down[place_j]: the experts' results back to their tokens. See moe.py for the arrays.
//
// Configuration: TOP_K; THREADS; CTAS per SM; UNROLL, vectors of a thread in flight, each with its TOP_K summands.
#include "memory.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) moe_combine(
    uint4* hidden,        // [*, vectors]
    const uint4* down,    // [rows, vectors]
    const int* places,    // [*, TOP_K]
    const float* shares,  // [*, TOP_K]
    const int* count,     // [1] tokens there are
    int start,
    int stop,
    int vectors) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int tokens = min(stop, *count) - start;
    if (tokens <= 0) return;
    uint4* const target = hidden + static_cast<int64_t>(start) * vectors;
    const uint32_t end = static_cast<uint32_t>(tokens) * vectors;
    for (uint32_t first = blockIdx.x * UNROLL * THREADS + threadIdx.x; first < end;
         first += gridDim.x * UNROLL * THREADS) {
        // All places before all rows, so that the rows of all vectors are on their way together.
        const uint4* from[UNROLL][TOP_K];
        float share[UNROLL][TOP_K];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const uint32_t at = min(first + i * THREADS, end - 1);
            const uint32_t token = at / vectors, column = at - token * vectors;
            const int64_t choice = static_cast<int64_t>(start + token) * TOP_K;
#pragma unroll
            for (int j = 0; j < TOP_K; ++j) {
                from[i][j] = down + static_cast<int64_t>(places[choice + j]) * vectors + column;
                share[i][j] = shares[choice + j];
            }
        }
        uint4 x[UNROLL], parts[UNROLL][TOP_K];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            x[i] = load_16(target + min(first + i * THREADS, end - 1));
#pragma unroll
            for (int j = 0; j < TOP_K; ++j) parts[i][j] = load_16(from[i][j]);
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const uint32_t at = first + i * THREADS;
            if (at >= end) break;
            float sum[8] = {}, residual[8];
#pragma unroll
            for (int j = 0; j < TOP_K; ++j) {
                float part[8];
                unpack_bf16(parts[i][j], part);
#pragma unroll
                for (int k = 0; k < 8; ++k) sum[k] = fmaf(share[i][j], part[k], sum[k]);
            }
            unpack_bf16(x[i], residual);
#pragma unroll
            for (int k = 0; k < 8; ++k) sum[k] += residual[k];
            target[at] = pack_bf16(sum);
        }
    }
}
