// The bar: which tokens may have the highest sum of scaled logit and Gumbel noise.
//
// Noise is drawn for every token that is kept, but its two logarithms are worked out for few. With u uniform, a token of
// weight p = exp(logit/T) ≤ 1 beats the score b only if −log u ≤ p·exp(−b), and −log u ≥ 1 − u. So 1 − u ≤ p·exp(−b) is
// asked of eight tokens at once, with the greatest u and the greatest p of them, then of each, with margins for rounding.
// The few that pass are scored exactly and raise the bar b for the rest. Where p·exp(−b) is below the least −log u there
// is, no noise is drawn. The highest score of tokens that weigh W together exceeds log(W / r) but with probability
// exp(−r), so the bar begins at log(W / r); should the winner miss that, all is done again.
#pragma once
#include "first_pass.cuh"
#include "philox.cuh"

struct Choice {
    float temperature, top_p, min_p;
    int top_k;
    Philox noise;

    __device__ __forceinline__ bool limits_count(int vocab_size) const { return top_k > 0 && top_k < vocab_size; }
    __device__ __forceinline__ bool limits_share() const { return top_p < 1; }
};

struct Best {
    float score = -INFINITE;
    int id = NONE;
};

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id) ? a : b;
}

// Exact score of a token, as the CPU executor computes it.
__device__ __forceinline__ void score_token(const Choice& choice, float top, float x, int id, Best& best) {
    best = better(best, {(x - top) / choice.temperature + gumbel(choice.noise.word(id)), id});
}

// Rounding of chances is within MARGIN, and so is what ex2.approx may lack of being monotone (2⁻²¹).
constexpr float MARGIN = 1.0001f, NEAR_ONE = 1.0f + 4e-7f;
constexpr float LEAST = 0.99f * 0x1p-24f;  // −log u is at least 2⁻²⁴
// r of the bar: one row in 160,000 is done again (at r = 8, one in 3000: with 1024 rows a launch would often wait for one),
// and the first 1/r of the weight is about what passes too easily.
constexpr float SURE = 12;

template <class Row>
constexpr int GROUP = 8 / Row::WIDTH;  // vectors whose noise is worked out together

// Which of the eight tokens of a group, whose first vector is `first`, may beat the bar: a bit each. `chance(logit, vector)`
// is p·exp(−b), and `bound` the greatest. Beyond the row's end the batch has −∞, which even a chance of 0 might let pass.
template <class Row, class Chance>
__device__ __forceinline__ uint32_t find_hits(
    const Batch<Row>& batch, int first, const Philox& noise, float bound, Chance chance) {
    if (!__any_sync(~0u, bound >= LEAST)) return 0;
    uint32_t words[8], most = 0, hits = 0;
    noise.words<2>(
        static_cast<uint32_t>(batch.id + first * batch.STRIDE) / 4, words, GROUP<Row> == 2 ? batch.STRIDE / 4 : 1);
#pragma unroll
    for (int j = 0; j < 8; ++j) most = max(most, words[j]);
    if (!(two_minus_uniform(most) <= bound + NEAR_ONE)) return 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int vector = j / Row::WIDTH;
        const float value = opaque(batch.x[first + vector][j % Row::WIDTH]);  // rare: not to be kept till here
        if (value > LOWEST && two_minus_uniform(words[j]) <= chance(value, vector) + NEAR_ONE) hits |= 1u << j;
    }
    return hits;
}

// Call visit(id, logit) for every hit.
template <class Row, class Visit>
__device__ __forceinline__ void visit_hits(const Row& row, const Batch<Row>& batch, int first, uint32_t hits, Visit visit) {
    for (; hits; hits &= hits - 1) {
        const int own = __ffs(hits) - 1;
        const int id = batch.id + (first + own / Row::WIDTH) * batch.STRIDE + own % Row::WIDTH;
        visit(id, row.at(id));
    }
}
