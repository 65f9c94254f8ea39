// Normal numbers N(0, std) in bf16: counter-based, so a value depends on the seed, the tensor and its place alone.
//
// A thread draws vectors of 8 values: vector i from the counters 2i and 2i + 1, two values of Box and Muller's method
// from each pair of words.
#include "memory.cuh"
#include "philox.cuh"

constexpr float TWO_POW_MINUS_32 = 0x1p-32f;

extern "C" __global__ void __launch_bounds__(256)
    random_fill(uint4* out, int64_t vectors, uint64_t seed, int tensor, float std) {
    const Philox philox = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                           static_cast<uint32_t>(tensor), 0};
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += threads) {
        uint32_t words[8];
        philox.words<2>(static_cast<uint32_t>(2 * i), words);
        float values[8];
#pragma unroll
        for (int pair = 0; pair < 8; pair += 2) {
            const float u = (static_cast<float>(words[pair]) + 0.5f) * TWO_POW_MINUS_32;  // in (0, 1]
            const float radius = std * sqrtf(-2.0f * logf(u));
            float sine, cosine;
            sincospif(2.0f * TWO_POW_MINUS_32 * static_cast<float>(words[pair + 1]), &sine, &cosine);
            values[pair] = radius * cosine;
            values[pair + 1] = radius * sine;
        }
        out[i] = pack_bf16(values);
    }
}
