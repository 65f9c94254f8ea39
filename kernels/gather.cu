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
    const int end = min(stop, load_input(count));
    for (int row = start + blockIdx.x; row < end; row += gridDim.x) {
        int id = load_input(token_ids + row);
        const int slot = load_input(token_slots + row), position = load_input(positions + row);
        int* const token = tokens + static_cast<int64_t>(slot) * tokens_stride + position;
        const bool given = id >= 0;
        if (!given) {
            grid_dependency_wait();  // the token buffer is written by the step before
            id = *token;
        }
        const uint4* const source = table + static_cast<int64_t>(id) * vectors;
        uint4 x[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < vectors) x[i] = load_16(source + at);
        }
        grid_dependency_wait();  // until here the row of a given id is fetched beside the kernel before
        if (given && threadIdx.x == 0) *token = id;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < vectors) hidden[static_cast<int64_t>(row) * vectors + at] = x[i];
        }
    }
    grid_dependency_wait();  // CTAs without work as well: the kernel must not end before those it depends on
}
