// Embedding gather from the device-side token buffer, one CTA per token at a time: see gather.py for the arrays.
#include "memory.cuh"

constexpr int VECTORS = 4;  // of 8 values, per thread

extern "C" __global__ void __launch_bounds__(512) embed(
    const uint4* table,      // [vocab_size, vectors]
    uint4* hidden,           // [*, vectors]
    int* tokens,             // [slots, tokens_stride], the token buffer
    const int* token_ids,    // [*] -1: in the token buffer
    const int* token_slots,  // [*]
    const int* positions,    // [*]
    const int* count,        // [1] tokens there are
    int start,
    int stop,
    int vectors,
    int tokens_stride) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int end = min(stop, *count);
    for (int row = start + blockIdx.x; row < end; row += gridDim.x) {
        int id = token_ids[row];
        int* const token = tokens + static_cast<int64_t>(token_slots[row]) * tokens_stride + positions[row];
        if (id < 0)
            id = *token;
        else if (threadIdx.x == 0)
            *token = id;
        const uint4* const source = table + static_cast<int64_t>(id) * vectors;
        uint4 x[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < vectors) x[i] = load_16(source + at);
        }
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < vectors) hidden[static_cast<int64_t>(row) * vectors + at] = x[i];
        }
    }
}
