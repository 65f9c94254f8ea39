// Small copies before a step: whole KV pages, and starts of token-buffer rows. See copies.py for the arrays.
#include "memory.cuh"

constexpr int THREADS = 256;
constexpr int VECTORS = 4;  // of 16 bytes, per thread: a CTA copies 16 KB at a time

// One unit of work is 16 KB of one page of one layer.
extern "C" __global__ void __launch_bounds__(THREADS) copy_pages(
    const char* source,
    char* destination,
    const int2* pairs,          // [*] (source page, destination page)
    const int* count,           // [1] pairs there are
    int layers,
    int vectors,                // 16-byte vectors of a page of a layer
    int64_t source_stride,      // bytes from a layer to the next
    int64_t destination_stride) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int parts = (vectors + THREADS * VECTORS - 1) / (THREADS * VECTORS);
    const int64_t units = static_cast<int64_t>(*count) * layers * parts;
    for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const int part = unit % parts;
        const int layer = unit / parts % layers;
        const int2 pair = pairs[unit / parts / layers];
        const int64_t page_bytes = static_cast<int64_t>(vectors) * 16;
        const uint4* from = reinterpret_cast<const uint4*>(source + layer * source_stride + pair.x * page_bytes);
        uint4* to = reinterpret_cast<uint4*>(destination + layer * destination_stride + pair.y * page_bytes);
        const int first = part * THREADS * VECTORS + threadIdx.x;
        uint4 x[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            if (first + i * THREADS < vectors) x[i] = load_16(from + first + i * THREADS);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            if (first + i * THREADS < vectors) to[first + i * THREADS] = x[i];
    }
}

// One fork per CTA at a time; rows need not be aligned to 16 bytes, so tokens are copied one by one.
extern "C" __global__ void __launch_bounds__(THREADS) fork_rows(
    int* tokens,       // [slots, tokens_stride], the token buffer
    const int* forks,  // [*, 3] (source slot, destination slot, length)
    const int* count,  // [1] forks there are
    int tokens_stride) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int end = *count;
    for (int i = blockIdx.x; i < end; i += gridDim.x) {
        const int* from = tokens + static_cast<int64_t>(forks[3 * i]) * tokens_stride;
        int* to = tokens + static_cast<int64_t>(forks[3 * i + 1]) * tokens_stride;
        const int length = forks[3 * i + 2];
#pragma unroll 4
        for (int position = threadIdx.x; position < length; position += THREADS) to[position] = from[position];
    }
}
