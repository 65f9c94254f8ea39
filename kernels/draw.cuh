// Drawing a token: temperature, min-p, top-k, top-p, and the highest sum of scaled logit and Gumbel noise (bar.cuh).
#pragma once
#include "draw_first.cuh"
#include "select.cuh"

// Below both zeros comes a negative value.
__device__ __forceinline__ float next_below(float x) { return key_value(order_key(x) - (x == 0 ? 2 : 1)); }

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

// What the first pass left in shared memory: nothing, the histogram, the sorted list of the highest logits, or the list of
// those that may win.
enum class Left { NOTHING, HISTOGRAM, LIST, CANDIDATES };

// The token of a row with these stats. The histogram may be overwritten; Left::LIST has at least top_k entries. `then()` is
// what is read next.
template <class Row, class Then>
__device__ __forceinline__ int draw_token(
    const Row& row, Shared& shared, Stream& stream, const Choice& choice, const Stats& stats, Left left,
    Then then) {
    const float top = stats.top;
    const Weight weight(top, choice.temperature);
    const bool few = choice.limits_count(row.vocab_size), share = choice.limits_share();
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
    for (float bar = SURE / least;; bar = INFINITE, counted = false) {  // exp(−b) of bar.cuh: the lower, the fewer pass
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
