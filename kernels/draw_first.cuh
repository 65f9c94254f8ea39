// Drawing a token in the first pass over a row.
//
// With no filter, a row is drawn from in its first pass, before its maximum is known: what passes is listed, and scored
// exactly in the end. The same with a high top-p where most tokens have some weight, as far as a sample tells (elsewhere the
// way of select.cuh is the faster one). Top-p keeps the tokens down to an unknown logit; so that the winner among them is
// listed wherever that is, only tokens above a bound, which is guessed to be higher, raise the bar. The winner of all is the
// winner of those kept if it is one of them; if not, the winner of those before it may be, and so on: a second pass sums what
// comes before the first few, and should none of them be kept, another what comes before the next. Where that does not tell,
// the row is drawn from as others are.
#pragma once
#include "bar.cuh"

// Whether the first pass over a row may be Drawing. With a smaller share the first winners are too seldom among those kept.
__device__ __forceinline__ bool may_draw_first(const Choice& choice, int vocab_size) {
    constexpr float LEAST_SHARE = 0.7f;
    return choice.temperature > 0 && !choice.limits_count(vocab_size) && choice.min_p <= 0 && choice.top_p >= LEAST_SHARE;
}

// These bars are in units of log₂ — logit · factor + noise · log₂ e — and of logits as they are, not less the highest.
// What rounding may do to one.
__device__ __forceinline__ float bar_slack(float bar) { return 2e-4f + 4e-7f * fabsf(bar); }

// A sum of weights and of weighted logits.
struct Moments {
    float weight, logit;
};

__device__ __forceinline__ Moments operator+(const Moments& a, const Moments& b) {
    return {a.weight + b.weight, a.logit + b.logit};
}

// Lists what may have the highest score of all tokens or, with top-p, of all down to some logit.
struct Drawing {
    static constexpr float FURTHEST = 1e5f;     // of logit · factor: beyond, the slack would let too much pass
    static constexpr float CAREFUL = 0.125f;    // trust in what a sample without its highest says of the row's weight
    static constexpr float MOST = 1.0f / 1024;  // mean weight from which most tokens have some, the sample's highest being 1
    Shared& shared;
    const Choice& choice;
    Philox noise;
    float factor;  // log₂ e / temperature

    __device__ __forceinline__ Drawing(Shared& shared, const Choice& choice)
        : shared(shared), choice(choice), noise(choice.noise), factor(Weight(0, choice.temperature).factor) {}

    // Before the pass: the bound and the first bar, from a sample whose highest logit is `highest`. Whether it is worth it.
    template <class Row>
    __device__ __forceinline__ bool begin(const Row& row, const uint4 (&sample)[SAMPLED], float highest) const {
        const bool share = choice.limits_share();
        const Weight weight(fmaxf(highest, LOWEST), choice.temperature);
        Moments own{};
#pragma unroll
        for (int i = 0; i < SAMPLED; ++i) {
            float x[Row::WIDTH];
            Row::unpack(sample[i], x);
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) own = own + Moments{weight(x[j]), weight(x[j]) * fmaxf(x[j], LOWEST)};
        }
        const Moments all = sum_threads(own, shared.scratch);
        if (share && all.weight < MOST * row.vocab_size / sample_ratio(row)) return false;
        clear_list(shared);
        if (threadIdx.x == 0) {
            shared.bound = share ? all.logit / all.weight : -INFINITE;  // the mean, about half of the weight is above
            const float of_row = (all.weight - 1) * sample_ratio(row) * CAREFUL;
            const float above = fmaxf(all.weight, of_row) * (share ? 0.5f : 1.0f);
            const float bar = fmaf(weight.top, factor, log2f(above / SURE));
            shared.first_bar = bar - bar_slack(bar);
            shared.bar = order_key(shared.first_bar);
        }
        __syncthreads();
        return true;
    }

    template <class Row>
    __device__ __forceinline__ void operator()(const Row& row, const Batch<Row>& batch, float) const {
        const volatile uint32_t* const highest_bar = &shared.bar;
        const float bar = key_value(*highest_bar);
        auto chance = [&](float logit, int = 0) { return exp2_approximate(fmaf(logit, factor, -bar)); };
#pragma unroll
        for (int first = 0; first < Batch<Row>::VECTORS; first += GROUP<Row>) {
            const float highest = chance(fmaxf(batch.highest[first], batch.highest[first + GROUP<Row> - 1]));
            visit_hits(row, batch, first, find_hits(batch, first, noise, highest, chance), [&](int id, float logit) {
                push(shared, logit, id);
                if (!(logit > shared.bound)) return;
                const float score = fmaf(logit, factor, gumbel(noise.word(id)) * LOG2_E);
                atomicMax(&shared.bar, order_key(score - bar_slack(score)));
            });
        }
    }
};

// One of those listed that may be chosen.
struct Winner {
    int id;  // NONE: there is none
    float logit;
    bool passed;  // the first bar: what has a higher score was not kept off the list by that
};

// The best of those listed that come before `than`.
template <class Row>
__device__ __forceinline__ Winner next_winner(
    const Row& row, Shared& shared, const Choice& choice, const Weight& weight, const Winner& than) {
    Best best;
    for (int i = threadIdx.x; i < shared.list_length; i += THREADS) {
        const float logit = listed_value(shared.list[i]);
        const int id = listed_id(shared.list[i]);
        if (logit > than.logit || (logit == than.logit && id < than.id)) score_token(choice, weight.top, logit, id, best);
    }
    best = reduce_threads(best, Best{}, shared.scratch, better);
    const float score = fmaf(weight.top, weight.factor, best.score * LOG2_E);
    return {best.id, best.id == NONE ? INFINITE : row.at(best.id), score >= shared.first_bar + 2 * bar_slack(score)};
}

// Winners that one pass over the row is asked about.
constexpr int ASKED = 3;

// Weights: of all; above the bound; of each winner and all that is not below it; of what is above each but the last.
struct Before {
    float all, bound, from[ASKED], above[ASKED - 1];
};

__device__ __forceinline__ Before operator+(const Before& a, const Before& b) {
    Before sum{a.all + b.all, a.bound + b.bound};
#pragma unroll
    for (int k = 0; k < ASKED; ++k) sum.from[k] = a.from[k] + b.from[k];
#pragma unroll
    for (int k = 0; k < ASKED - 1; ++k) sum.above[k] = a.above[k] + b.above[k];
    return sum;
}

// One pass over the row; `then` is what is read next.
template <class Row>
__device__ __forceinline__ Before sum_before(
    const Row& row, Shared& shared, Stream& stream, const Weight& weight, const Winner (&winners)[ASKED],
    const Source& then) {
    const float bound = shared.bound;
    Before own{};
    stream.batches(row, then, [&](const Batch<Row>& batch) {
#pragma unroll
        for (int i = 0; i < batch.VECTORS; ++i) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) {
                const float x = batch.x[i][j], weighs = weight(x);
                auto add = [&](float& sum, bool counts) { sum = fmaf(weighs, counts ? 1.0f : 0.0f, sum); };
                own.all += weighs;
                add(own.bound, x > bound);
#pragma unroll
                for (int k = 0; k < ASKED; ++k) add(own.from[k], x >= winners[k].logit);
#pragma unroll
                for (int k = 0; k < ASKED - 1; ++k) add(own.above[k], x > winners[k].logit);
            }
        }
    });
    return sum_threads(own, shared.scratch);
}

// The token of a row that was listed by Drawing; NONE if that does not tell. `then` is what is read next if one pass tells.
template <class Row>
__device__ __forceinline__ int token_of_listed(
    const Row& row, Shared& shared, Stream& stream, const Choice& choice, const Weight& weight, const Source& then) {
    constexpr float ROUNDING = 3e-5f;  // two sums of some 500 additions a thread differ by 7e-6 at most as far as was seen
    if (shared.list_length > LIST || fabsf(weight.top * weight.factor) > Drawing::FURTHEST) return NONE;
    Winner winners[ASKED];
    winners[0] = next_winner(row, shared, choice, weight, {NONE, -INFINITE});
    if (!choice.limits_share()) return winners[0].passed ? winners[0].id : NONE;
#pragma unroll 1
    for (bool first = true;; first = false) {
#pragma unroll
        for (int k = 1; k < ASKED; ++k) winners[k] = next_winner(row, shared, choice, weight, winners[k - 1]);
        const Before sums = sum_before(row, shared, stream, weight, winners, then);
        const float less = choice.top_p * sums.all * (1 - ROUNDING), more = choice.top_p * sums.all * (1 + ROUNDING);
#pragma unroll
        for (int k = 0; k < ASKED; ++k) {
            const Winner& winner = winners[k];
            if (winner.id == NONE || !winner.passed) return NONE;
            if (sums.from[k] - weight(winner.logit) < less) return first && k == 0 || sums.bound <= less ? winner.id : NONE;
            if (k < ASKED - 1 && !(sums.above[k] >= more)) return NONE;
        }
        if (sums.bound > less) return NONE;
        winners[0] = winners[ASKED - 1];  // whether that is kept after all is not known yet
    }
}
