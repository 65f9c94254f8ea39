// Philox4x32-10 (Salmon et al., SC'11) and the Gumbel noise drawn from it, as in nf/executors/philox.py.
#pragma once
#include "hopper.cuh"

// The noise of one choice: token id t takes word t mod 4 of the counter (t div 4, position, sample, 0).
struct Philox {
    uint32_t key0, key1, position, sample;

    // Words of COUNT counters, `step` apart from `block` on; together, since they share the keys of the rounds.
    template <int COUNT>
    __device__ __forceinline__ void words(uint32_t block, uint32_t (&words)[4 * COUNT], uint32_t step = 1) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            words[4 * i] = block + i * step;
            words[4 * i + 1] = position;
            words[4 * i + 2] = sample;
            words[4 * i + 3] = 0;
        }
        uint32_t k0 = key0, k1 = key1;
#pragma unroll
        for (int round = 0; round < 10; ++round) {
#pragma unroll
            for (int i = 0; i < 4 * COUNT; i += 4) {
                const uint64_t left = static_cast<uint64_t>(words[i]) * 0xD2511F53u;
                const uint64_t right = static_cast<uint64_t>(words[i + 2]) * 0xCD9E8D57u;
                words[i] = static_cast<uint32_t>(right >> 32) ^ words[i + 1] ^ k0;
                words[i + 1] = static_cast<uint32_t>(right);
                words[i + 2] = static_cast<uint32_t>(left >> 32) ^ words[i + 3] ^ k1;
                words[i + 3] = static_cast<uint32_t>(left);
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
    }

    __device__ __forceinline__ uint32_t word(uint32_t token) const {
        uint32_t w[4];
        words<1>(token / 4, w);
        const uint32_t low = token % 2 ? w[1] : w[0], high = token % 2 ? w[3] : w[2];
        return token % 4 < 2 ? low : high;
    }
};

// −log(−log u) with u = (k + ½) · 2⁻²³ of the upper 23 bits k: exact up to both logarithms.
__device__ __forceinline__ float gumbel(uint32_t word) {
    const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
    return -logf(-logf(u));
}

// 2 − u − 2⁻²⁴, in [1, 2): as good as 1 − u, and two instructions from the word.
__device__ __forceinline__ float two_minus_uniform(uint32_t word) {
    return __uint_as_float((~word >> 9) | 0x3F800000u);
}
