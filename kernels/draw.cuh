// Drawing a token: temperature, min-p, top-k, top-p, and the highest sum of scaled logit and Gumbel noise.
//
// Noise is drawn for every token that is kept, but its two logarithms are worked out for few. With u uniform, a token of
// weight p = exp(logit/T) ≤ 1 beats the score b only if −log u ≤ p·exp(−b), and −log u ≥ 1 − u. So 1 − u ≤ p·exp(−b) is
// asked of eight tokens at once, with the greatest u and the greatest p of them, then of each, with margins for rounding.
// The few that pass are scored exactly and raise the bar b for the rest. Where p·exp(−b) is below the least −log u there
// is, no noise is drawn. The highest score of tokens that weigh W together exceeds log(W / r) but with probability
// exp(−r), so the bar begins at log(W / r); should the winner miss that, all is done again.
//
// With no filter, a row is drawn from in its first pass, before its maximum is known: what passes is listed, and scored
// exactly in the end. The same with a high top-p where most tokens have some weight, as far as a sample tells (elsewhere the
// way of select.cuh is the faster one). Top-p keeps the tokens down to an unknown logit; so that the winner among them is
// listed wherever that is, only tokens above a bound, which is guessed to be higher, raise the bar. The winner of all is the
// winner of those kept if it is one of them; if not, the winner of those before it may be, and so on: a second pass sums what
// comes before the first few. Should that not tell, the row is drawn from as others are.
#pragma once
#include "philox.cuh"
#include "select.cuh"

struct Choice {
    float temperature, top_p, min_p;
    int top_k;
    Philox noise;
};

struct Best {
    float score = -INFINITE;
    int id = NONE;
};

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id) ? a : b;
}

// Below both zeros comes a negative value.
__device__ __forceinline__ float next_below(float x) { return key_value(order_key(x) - (x == 0 ? 2 : 1)); }

// Exact score of a token, as the CPU executor computes it.
__device__ __forceinline__ void score_token(const Choice& choice, float top, float x, int id, Best& best) {
    best = better(best, {(x - top) / choice.temperature + gumbel(choice.noise.word(id)), id});
}

// The lowest logit that min-p keeps.
__device__ __forceinline__ float min_p_floor(Shared& shared, const Choice& choice, float top) {
    if (threadIdx.x == 0) {
        const float limit = logf(choice.min_p);
        uint32_t low = order_key(LOWEST), high = order_key(top);
        while (low < high) {
            const uint32_t middle = low + (high - low) / 2;
            if ((key_value(middle) - top) / choice.temperature >= limit)
                high = middle;
            else
                low = middle + 1;
        }
        shared.floor = key_value(low);
    }
    __syncthreads();
    return shared.floor;
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

// What a pass does with a logit: keep it and draw for it, list it, or drop it.
struct Cut {
    float high = LOWEST;     // logits above are kept
    float low = INFINITE;    // logits from here to `high` are listed
    float floor = -INFINITE; // logits below have no weight
    int tie = -1;            // tokens up to this id are kept if they equal `high`
    bool draw = true;
    bool count = false;      // the tokens kept
    float all = 0;           // weight of all; 0: not known
};

struct Sums {
    uint32_t count, unused;  // of tokens kept, where they were to be counted
    double kept, all;        // weight
};

__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
    return {a.count + b.count, 0, a.kept + b.kept, a.all + b.all};
}

// One pass over the row. FILTERED also sums weights and fills the list, which must be clear.
template <bool FILTERED, class Row>
__device__ __forceinline__ Sums draw_pass(
    const Row& row, Shared& shared, Stream& stream, const Choice& choice, const Weight& weight, const Cut& cut, float bar,
    Best& best, const Source& then) {
    constexpr int GROUP = ::GROUP<Row>, GROUPS = Batch<Row>::VECTORS / GROUP;
    if (threadIdx.x == 0) shared.bar = __float_as_uint(bar * MARGIN);
    __syncthreads();
    const Philox noise = choice.noise;
    const float high_before_tie = next_below(cut.high);
    const volatile uint32_t* const lowest_bar = &shared.bar;
    const bool sum_all = FILTERED && cut.all == 0;
    // A quick test of whether a logit is listed: its distance from the middle of the range. Arithmetic rather than logic, of
    // which a thread has little: predicates are few.
    const float upper = fminf(cut.high, weight.top);
    const bool lists = cut.low <= upper;
    const float middle = lists ? 0.5f * cut.low + 0.5f * upper : 0.0f;
    const float reach = lists ? 0.5f * (upper - cut.low) + 1e-6f * fmaxf(fabsf(cut.low), fabsf(upper)) : -1.0f;
    const float lowest = fminf(cut.low, high_before_tie);  // what is below is neither kept nor listed
    float kept = 0, all = 0, count = 0;
    stream.batches(row, then, [&](const Batch<Row>& batch) {
        const auto& x = batch.x;
        float highest[GROUPS], peak = -INFINITE;  // of each group, of all
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
            highest[i] = fmaxf(batch.highest[i * GROUP], batch.highest[i * GROUP + GROUP - 1]);
            peak = fmaxf(peak, highest[i]);
        }
        if (FILTERED && !sum_all && !__any_sync(~0u, peak >= lowest)) return;
        const float scale = __uint_as_float(*lowest_bar);
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const int first = group * GROUP;
            auto id_of = [&](int i) { return batch.id + (first + i) * batch.STRIDE; };
            float high[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
                high[i] = FILTERED && id_of(i) + Row::WIDTH - 1 <= cut.tie ? high_before_tie : cut.high;
            if constexpr (FILTERED) {
                float nearest = INFINITE;
#pragma unroll
                for (int i = 0; i < GROUP; ++i) {
#pragma unroll
                    for (int j = 0; j < Row::WIDTH; ++j) {
                        const float value = x[first + i][j];
                        kept = fmaf(weight(value), value > high[i] ? 1.0f : 0.0f, kept);
                        nearest = fminf(nearest, fabsf(value - middle));
                    }
                }
                if (cut.count) {  // compared anew, or the compiler adds up in any case
#pragma unroll
                    for (int i = 0; i < GROUP; ++i) {
#pragma unroll
                        for (int j = 0; j < Row::WIDTH; ++j) count += opaque(x[first + i][j]) > high[i] ? 1.0f : 0.0f;
                    }
                }
                if (sum_all) {
#pragma unroll
                    for (int i = 0; i < GROUP; ++i) {
#pragma unroll
                        for (int j = 0; j < Row::WIDTH; ++j)
                            all = fmaf(weight(x[first + i][j]), x[first + i][j] >= cut.floor ? 1.0f : 0.0f, all);
                    }
                }
                if (nearest <= reach) {
#pragma unroll
                    for (int i = 0; i < GROUP; ++i) {
#pragma unroll
                        for (int j = 0; j < Row::WIDTH; ++j) {
                            const float value = opaque(x[first + i][j]);  // rare, as below
                            if (!(value > high[i]) && value >= cut.low) push(shared, value, id_of(i) + j);
                        }
                    }
                }
                if (!cut.draw) continue;
            }
            const float bound = !FILTERED || highest[group] > high[0] ? weight(highest[group]) * scale : 0.0f;
            const uint32_t hits = find_hits(batch, first, noise, bound, [&](float value, int vector) {
                return value > high[vector] ? weight(value) * scale : -INFINITE;
            });
            if (!hits) continue;
            visit_hits(row, batch, first, hits, [&](int id, float value) {
                score_token(choice, weight.top, value, id, best);
            });
            const float lower = expf(-best.score) * MARGIN;
            atomicMin(&shared.bar, __float_as_uint(lower));
        }
    });
    if (!FILTERED) return {};
    const int straddling = cut.tie / Row::WIDTH * Row::WIDTH;
    if (threadIdx.x == 0 && cut.tie >= 0 && cut.tie % Row::WIDTH != Row::WIDTH - 1) {
        for (int id = straddling; id <= cut.tie; ++id) {
            if (row.at(id) != cut.high) continue;
            ++count;
            kept += weight(cut.high);
            if (cut.draw) score_token(choice, weight.top, cut.high, id, best);
        }
    }
    Sums sums = sum_threads(Sums{static_cast<uint32_t>(count), 0, kept, all}, shared.scratch);
    if (!sum_all) sums.all = cut.all;
    return sums;
}

// Where the sorted list is cut, and the weight of all that is kept. `length` is capped by what fits.
struct Kept {
    int length;
    double weight;
};

__device__ __forceinline__ Kept cut_list(
    Shared& shared, const Weight& weight, const Sums& sums, const Target& target, int length) {
    const int share = (length + THREADS - 1) / THREADS, first = threadIdx.x * share;
    const int last = min(first + share, length);
    auto sum_until = [&](int end) {
        double own = 0;
        for (int i = first; i < min(last, end); ++i) own += weight(listed_value(shared.list[i]));
        return own;
    };
    int kept = length;
    double all = sums.all;
    if (target.count) {
        kept = min(kept, max(target.count - static_cast<int>(sums.count), 0));
        all = sums.kept + sum_threads(sum_until(kept), shared.scratch);
    }
    if (target.limits_weight()) {
        double total;
        double reached = sums.kept + scan_threads(sum_until(length), total, shared.scratch);
        int before = 0;  // entries that do not suffice
        for (int i = first; i < last; ++i) {
            reached += weight(listed_value(shared.list[i]));
            before += reached < target.wanted(all);
        }
        kept = min(kept, 1 + sum_threads(before, shared.scratch));
    }
    return {kept, sums.kept + sum_threads(sum_until(kept), shared.scratch)};
}

// ---- Drawing in the first pass ----

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
        const bool share = choice.top_p < 1;
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

// Weights: of all; above the bound; of each winner and all that is not below it; of what is above each but the last.
struct Before {
    float all, bound, from[3], above[2];
};

__device__ __forceinline__ Before operator+(const Before& a, const Before& b) {
    return {a.all + b.all, a.bound + b.bound, {a.from[0] + b.from[0], a.from[1] + b.from[1], a.from[2] + b.from[2]},
            {a.above[0] + b.above[0], a.above[1] + b.above[1]}};
}

// The token of a row that was listed by Drawing; NONE if that does not tell. `then` is what is read next.
template <class Row>
__device__ __forceinline__ int token_of_listed(
    const Row& row, Shared& shared, Stream& stream, const Choice& choice, const Weight& weight, const Source& then) {
    constexpr float ROUNDING = 1e-4f;
    if (shared.list_length > LIST || fabsf(weight.top * weight.factor) > Drawing::FURTHEST) return NONE;
    Winner winners[3];
    winners[0] = next_winner(row, shared, choice, weight, {NONE, -INFINITE});
    if (choice.top_p >= 1) return winners[0].passed ? winners[0].id : NONE;
    winners[1] = next_winner(row, shared, choice, weight, winners[0]);
    winners[2] = next_winner(row, shared, choice, weight, winners[1]);
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
                for (int k = 0; k < 3; ++k) add(own.from[k], x >= winners[k].logit);
#pragma unroll
                for (int k = 0; k < 2; ++k) add(own.above[k], x > winners[k].logit);
            }
        }
    });
    const Before sums = sum_threads(own, shared.scratch);
    const float less = choice.top_p * sums.all * (1 - ROUNDING), more = choice.top_p * sums.all * (1 + ROUNDING);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        const Winner& winner = winners[k];
        if (winner.id == NONE) return NONE;
        if (sums.from[k] - weight(winner.logit) < less) {
            return winner.passed && (k == 0 || sums.bound <= less) ? winner.id : NONE;
        }
        if (k == 2 || !(sums.above[k] >= more)) return NONE;
    }
    return NONE;
}

// What the first pass left in shared memory: nothing, the histogram, the sorted list of the highest logits, or the list of
// those that may win.
enum class Left { NOTHING, HISTOGRAM, LIST, CANDIDATES };

// Whether the first pass over a row may be Drawing. Of a smaller share the first winners are too seldom.
__device__ __forceinline__ bool may_draw_first(const Choice& choice, int vocab_size) {
    constexpr float LEAST_SHARE = 0.7f;
    const bool few = choice.top_k > 0 && choice.top_k < vocab_size;
    return choice.temperature > 0 && !few && choice.min_p <= 0 && choice.top_p >= LEAST_SHARE;
}

// The token of a row with these stats. The histogram may be overwritten; Left::LIST has at least top_k entries. `then()` is
// what is read next.
template <class Row, class Then>
__device__ __forceinline__ int draw_token(
    const Row& row, Shared& shared, Stream& stream, const Choice& choice, const Stats& stats, Left left,
    Then then) {
    const float top = stats.top;
    const Weight weight(top, choice.temperature);
    const bool few = choice.top_k > 0 && choice.top_k < row.vocab_size, share = choice.top_p < 1;
    if (left == Left::CANDIDATES) {
        const int id = token_of_listed(row, shared, stream, choice, weight, then());
        if (id != NONE) return id;
        if (share) {
            begin_histogram(shared, top, choice.temperature);
            own_stats(row, stream, source_of(row), Counting(shared));
            __syncthreads();
            left = Left::HISTOGRAM;
        }
    }
    Cut whole;
    if (choice.min_p > 0) {
        whole.floor = min_p_floor(shared, choice, top);
        whole.high = next_below(whole.floor);
    } else if (choice.temperature == 1) {
        whole.all = stats.mass();
    }
    // At least this weight is kept: a temperature above 1 only adds to it, and the most likely token has 1.
    const bool least_known = choice.temperature >= 1 && choice.min_p <= 0 && !few;
    const float least = least_known ? fmaxf(1.0f, choice.top_p * stats.mass() * 0.999f) : 1.0f;
    bool counted = left == Left::HISTOGRAM;
    for (float bar = SURE / least;; bar = INFINITE, counted = false) {
        Best best;
        Cut cut = whole;
        auto score_listed = [&](int length) {
            for (int i = threadIdx.x; i < length; i += THREADS)
                score_token(choice, top, listed_value(shared.list[i]), listed_id(shared.list[i]), best);
        };
        if (!few && !share) {
            draw_pass<false>(row, shared, stream, choice, weight, cut, bar, best, then());
        } else if (few && left == Left::LIST) {
            int length = 0;  // of what min-p leaves
            for (int i = threadIdx.x; i < min(shared.list_length, choice.top_k); i += THREADS)
                length += listed_value(shared.list[i]) >= cut.floor;
            length = sum_threads(length, shared.scratch);
            score_listed(cut_list(shared, weight, Sums{}, Target{choice.top_k, choice.top_p, 0}, length).length);
            bar = INFINITE;
        } else {
            constexpr uint32_t COMFORTABLE = LIST * 3 / 4;
            const uint32_t lowest = order_key(fmaxf(cut.floor, LOWEST));
            Target target{few ? choice.top_k : 0, choice.top_p, 0};
            // Every round bounds the value at which what is kept ends (cut.low to cut.high), draws for what is above the
            // bounds and lists what is within them, in one pass; the sorted list then tells the very end. Bounds are from
            // the histogram while there is one (`counted`): then the pass may find that they do not hold, or hold more
            // than the list does. The next round takes those of refine, which are right (`exact`).
            bool two_steps = false;  // a share of a prefix that is too long for the list: first find where that ends
            bool exact = false;      // the bounds are
            Kept kept;
            for (;;) {
                if (counted && !exact) {
                    const bool both = target.count && target.limits_weight();
                    const Bracket found =
                        find_bracket(shared, weight, cut.floor, row.vocab_size, both ? target.only_count() : target);
                    const bool fits = found.up_to <= COMFORTABLE;
                    cut.low = fmaxf(found.low, LOWEST);
                    cut.high = fits ? INFINITE : fmaxf(found.high, whole.high);
                    if (both && !fits) two_steps = true;
                } else {
                    two_steps |= target.count && target.limits_weight();
                    const Target step = two_steps ? target.only_count() : target;
                    const Refined found = refine(row, shared, stream, weight, cut.floor, step, lowest, order_key(top));
                    counted = false;
                    exact = true;
                    cut.low = found.count ? INFINITE : found.low;
                    cut.high = found.high;
                    cut.tie = found.count ? find_tie(row, shared, stream, found.high, found.count) : -1;
                }
                const Target step = two_steps ? target.only_count() : target;
                cut.draw = !two_steps;
                cut.count = step.count > 0;
                best = Best{};
                clear_list(shared);
                const Sums sums = draw_pass<true>(
                    row, shared, stream, choice, weight, cut, bar, best, either(two_steps, Source{}, then()));
                const int length = shared.list_length;
                if (length > LIST) {  // the bounds were not close enough
                    counted = exact = false;
                    continue;
                }
                sort_list(shared, length);
                kept = cut_list(shared, weight, sums, step, length);
                const bool begins =
                    step.count ? static_cast<int>(sums.count) < step.count : sums.kept < step.wanted(sums.all);
                const bool ends = cut.low <= fmaxf(cut.floor, LOWEST) ||
                                  (step.count ? static_cast<int>(sums.count) + length >= step.count
                                              : kept.length < length || kept.weight >= step.wanted(sums.all));
                if (!exact && !(begins && ends)) {
                    counted = false;
                    continue;
                }
                if (!two_steps) break;
                // A share of the prefix is a weight.
                target.count = 0;
                target.weight = target.share * kept.weight;
                target.share = static_cast<float>(target.weight / sums.all);
                two_steps = exact = false;
                cut.tie = -1;
            }
            score_listed(kept.length);
        }
        best = reduce_threads(best, Best{}, shared.scratch, better);
        if (!(bar < INFINITE) || best.score >= -logf(bar)) return best.id;
    }
}
