// Router of a mixture of experts: logits = normed · weightᵀ, softmax over all experts, the most likely ones and their
// shares. See moe.py for the arrays.
//
// A CTA owns TOKENS tokens, each of its warps a share of the columns. A lane's 16-byte load of a row holds the operands of
// two mma.sync: the order of columns within a product does not matter as long as both operands agree on it. So every value
// of `normed` goes straight from memory into one register, once.
//
// Configuration, per CTA: WARPS, TOKENS (a multiple of 16), EXPERTS (a multiple of 8, at most 64); CTAS per SM.
#include "memory.cuh"
#include "reduce.cuh"

constexpr int TOKEN_BLOCKS = TOKENS / 16;
constexpr int EXPERT_BLOCKS = EXPERTS / 8;
constexpr int CHUNK = 8;                               // vectors of 8 values: 128 bytes of a row
constexpr int PER_LANE = (EXPERTS + 31) / 32;          // experts of a lane in the softmax
constexpr float CHOSEN = -2.0f, NOT_A_NUMBER = -1.0f;  // below every share

struct Candidate {
    float share;
    int expert;
};

__device__ __forceinline__ Candidate better(const Candidate& a, const Candidate& b) {
    return a.share > b.share || (a.share == b.share && a.expert < b.expert) ? a : b;
}

__device__ __forceinline__ const uint32_t* words(const uint4& v) { return reinterpret_cast<const uint32_t*>(&v); }

// One token, one warp: softmax of its logits, then the top_k largest shares, ties to the lower expert.
__device__ __forceinline__ void choose(
    const float (&logits)[PER_LANE], int num_experts, int top_k, int* experts, float* shares) {
    const int lane = lane_index();
    auto larger = [](float a, float b) { return fmaxf(a, b); };
    auto sum = [](float a, float b) { return a + b; };
    float most = __uint_as_float(0xFF800000);  // -inf
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
        if (lane + 32 * i < num_experts) most = fmaxf(most, logits[i]);
    most = reduce_lanes(most, larger);
    float share[PER_LANE], total = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        share[i] = lane + 32 * i < num_experts ? expf(logits[i] - most) : 0.0f;
        total += share[i];
    }
    total = reduce_lanes(total, sum);
    Candidate left[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int expert = lane + 32 * i;
        const float value = share[i] / total;
        left[i] = {expert >= num_experts ? CHOSEN : value == value ? value : NOT_A_NUMBER, expert};
    }
    Candidate mine{};
    float kept = 0;
    for (int j = 0; j < top_k; ++j) {
        Candidate best = left[0];
#pragma unroll
        for (int i = 1; i < PER_LANE; ++i) best = better(best, left[i]);
        best = reduce_lanes(best, better);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (left[i].expert == best.expert) left[i].share = CHOSEN;
        // A token that is not a number gets experts all the same, and its sum of shares, NaN, as its shares.
        if (best.share == NOT_A_NUMBER) best.share = total;
        kept += best.share;
        if (lane == j) mine = best;
    }
    if (lane < top_k) {
        experts[lane] = mine.expert;
        shares[lane] = mine.share / kept;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, CTAS) moe_router(
    const uint4* normed,  // [*, vectors]
    const uint4* weight,  // [num_experts, vectors]
    int* experts,         // [*, top_k]
    float* shares,        // [*, top_k]
    const int* count,     // [1] rows there are
    int start,
    int stop,
    int vectors,
    int num_experts,
    int top_k) {
    extern __shared__ float partial[];  // [WARPS, TOKENS, EXPERTS]
    const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;
    // The weight does not depend on the kernel before: bring it closer while that one ends.
    const int line = blockIdx.x * blockDim.x + threadIdx.x;
    if (line < num_experts * vectors / 8) prefetch_to_l2(weight + 8 * line);
    grid_dependency_launch();
    grid_dependency_wait();
    const int end = min(stop, *count);
    const int first = start + blockIdx.x * TOKENS;
    if (first >= end) return;

    const uint4* x[TOKEN_BLOCKS][2];
    const uint4* w[EXPERT_BLOCKS];
#pragma unroll
    for (int m = 0; m < TOKEN_BLOCKS; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)  // rows past the end repeat the last one and are dropped below
            x[m][half] = normed + static_cast<int64_t>(min(first + 16 * m + 8 * half + g, end - 1)) * vectors;
#pragma unroll
    for (int n = 0; n < EXPERT_BLOCKS; ++n)
        w[n] = weight + static_cast<int64_t>(min(8 * n + g, num_experts - 1)) * vectors;
    float d[TOKEN_BLOCKS][EXPERT_BLOCKS][4] = {};
#pragma unroll 2
    for (int chunk = warp; chunk * CHUNK < vectors; chunk += WARPS) {
        uint4 a[2][TOKEN_BLOCKS][2], b[2][EXPERT_BLOCKS];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int at = chunk * CHUNK + 4 * part + t;
            const bool inside = at < vectors;
#pragma unroll
            for (int m = 0; m < TOKEN_BLOCKS; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    a[part][m][half] = inside ? load_16(x[m][half] + at) : uint4{};
#pragma unroll
            for (int n = 0; n < EXPERT_BLOCKS; ++n) b[part][n] = inside ? __ldg(w[n] + at) : uint4{};
        }
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
#pragma unroll
                for (int m = 0; m < TOKEN_BLOCKS; ++m) {
                    const uint32_t* const low = words(a[part][m][0]);
                    const uint32_t* const high = words(a[part][m][1]);
                    const uint32_t rows[4] = {low[i], high[i], low[i + 1], high[i + 1]};
#pragma unroll
                    for (int n = 0; n < EXPERT_BLOCKS; ++n)
                        mma_16x8x16(d[m][n], rows, words(b[part][n])[i], words(b[part][n])[i + 1]);
                }
    }
#pragma unroll
    for (int m = 0; m < TOKEN_BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < EXPERT_BLOCKS; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = 16 * m + 8 * half + g;
                float2* const target =
                    reinterpret_cast<float2*>(partial + (warp * TOKENS + token) * EXPERTS + 8 * n + 2 * t);
                *target = {d[m][n][2 * half], d[m][n][2 * half + 1]};
            }
    __syncthreads();
    for (int token = warp; token < min(TOKENS, end - first); token += WARPS) {
        float logits[PER_LANE] = {};
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (lane + 32 * i < EXPERTS) {
#pragma unroll
                for (int k = 0; k < WARPS; ++k) logits[i] += partial[(k * TOKENS + token) * EXPERTS + lane + 32 * i];
            }
        const int64_t row = static_cast<int64_t>(first + token) * top_k;
        choose(logits, num_experts, top_k, experts + row, shares + row);
    }
}
