// RMSNorm of bf16 rows, one CTA per row at a time: see norm.py for the arrays.
//
// A thread keeps up to VECTORS vectors of the row in registers between the sum of squares and the scaling, so a row is
// read once. Many small CTAs per SM keep memory busy while some of them wait for their sum.
//
// Configuration: ADD (hidden += delta first), GATHER (rows are listed).
#include "memory.cuh"

constexpr int VECTORS = 4;  // of 8 values, per thread
constexpr int MAX_WARPS = 16;

// Sum over the CTA, the same in all threads. `parity` alternates between calls, which saves a second barrier.
__device__ __forceinline__ float sum_of_threads(float value, int parity) {
    __shared__ float sums[2][MAX_WARPS];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    const int warps = blockDim.x / 32;
    if (warps == 1) return value;
    if (threadIdx.x % 32 == 0) sums[parity][threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < warps; ++i) total += sums[parity][i];
    return total;
}

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, ADD ? 2 : 3) rms_norm(
    uint4* hidden,        // [*, vectors]
    const uint4* delta,   // [*, vectors], ADD
    const uint4* weight,  // [vectors]
    uint4* normed,        // [*, vectors]
    const int* rows,      // row of `hidden` for each row of `normed`, GATHER
    const int* count,     // [1] rows there are
    int start,
    int stop,
    int vectors,
    float eps) {
    // What no kernel before writes is read before they end. The weight goes to shared memory: registers are better spent
    // on rows in flight.
    extern __shared__ uint4 scale[];
    for (int at = threadIdx.x; at < vectors; at += blockDim.x) scale[at] = load_constant_16(weight + at);
    const int end = min(stop, load_input(count));
    int row = start + blockIdx.x;
    int listed = GATHER && row < end ? load_input(rows + row) : row;
    __syncthreads();
    grid_dependency_launch();
    grid_dependency_wait();
    for (int parity = 0; row < end; parity ^= 1) {
        uint4* const source = hidden + static_cast<int64_t>(listed) * vectors;
        uint4 x[VECTORS] = {};
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < vectors) x[i] = load_16(source + at);
        }
        if constexpr (ADD) {
            uint4 y[VECTORS] = {};
#pragma unroll
            for (int i = 0; i < VECTORS; ++i) {
                const int at = threadIdx.x + i * blockDim.x;
                if (at < vectors) y[i] = load_16(delta + static_cast<int64_t>(row) * vectors + at);
            }
#pragma unroll
            for (int i = 0; i < VECTORS; ++i) {
                const int at = threadIdx.x + i * blockDim.x;
                float a[8], b[8];
                unpack_bf16(x[i], a);
                unpack_bf16(y[i], b);
#pragma unroll
                for (int j = 0; j < 8; ++j) a[j] += b[j];
                x[i] = pack_bf16(a);  // the norm is of what is stored, as if the addition were a kernel of its own
                if (at < vectors) source[at] = x[i];
            }
        }
        float squares = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            float a[8];
            unpack_bf16(x[i], a);
#pragma unroll
            for (int j = 0; j < 8; ++j) squares = fmaf(a[j], a[j], squares);
        }
        // Unpacked again below: fp32 values would take twice the registers until then, so fewer rows in flight.
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) x[i] = kept(x[i]);
        const float mean = sum_of_threads(squares, parity) / static_cast<float>(8 * vectors);
        const float factor = rsqrtf(mean + eps);
        uint4* const target = normed + static_cast<int64_t>(row) * vectors;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at >= vectors) break;
            float a[8], w[8];
            unpack_bf16(x[i], a);
            unpack_bf16(scale[at], w);
#pragma unroll
            for (int j = 0; j < 8; ++j) a[j] *= factor * w[j];
            target[at] = pack_bf16(a);
        }
        row += gridDim.x;
        listed = GATHER && row < end ? rows[row] : row;
    }
}
