// Drawing a token: temperature, min-p, top-k, top-p, and the highest sum of scaled logit and Gumbel noise.
//
// Noise is drawn for every token that is kept, but its two logarithms are worked out for few. With u uniform, a token of
// weight p = exp(logit/T) ≤ 1 beats the score b only if −log u ≤ p·exp(−b), and −log u ≥ 1 − u. So 1 − u ≤ exp(−b) is
// asked of all, as a comparison of integers, then 1 − u ≤ p·exp(−b), with margins for rounding. The few that pass are
// scored exactly and lower the bar exp(−b) for the rest.
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

// What a pass does with a logit: keep it and draw for it, list it, or drop it.
struct Cut {
    float high = LOWEST;     // logits above are kept
    float low = INFINITE;    // logits from here to `high` are listed
    float floor = -INFINITE; // logits below have no weight
    int tie = -1;            // tokens up to this id are kept if they equal `high`
    bool draw = true;
};

struct Sums {
    uint32_t count, unused;  // of tokens kept
    double kept, all;        // weight
};

__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
    return {a.count + b.count, 0, a.kept + b.kept, a.all + b.all};
}

// One pass over the row. FILTERED also sums weights and fills the list, which must be clear.
template <bool FILTERED, class Row>
__device__ __forceinline__ Sums draw_pass(
    const Row& row, Shared& shared, const Choice& choice, const Weight& weight, const Cut& cut, Best& best) {
    constexpr float MARGIN = 1.0001f, NEAR_ONE = 1.0f + 4e-7f;
    if (threadIdx.x == 0) shared.bar = INFINITE_BITS, shared.least_word = 0;
    __syncthreads();
    const Philox noise = choice.noise;
    const float high_before_tie = next_below(cut.high);
    const volatile uint32_t* const bar = &shared.bar;
    const volatile uint32_t* const least_word = &shared.least_word;
    float kept = 0, all = 0;
    uint32_t count = 0;
    sweep(row, shared, [&](int id, const float (&x)[Row::WIDTH]) {
        const float high = FILTERED && id + Row::WIDTH - 1 <= cut.tie ? high_before_tie : cut.high;
        if constexpr (FILTERED) {
            bool some = false;
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) {
                const bool above = x[j] > high;
                const float w = weight(x[j]);
                all += x[j] >= cut.floor ? w : 0.0f;
                kept += above ? w : 0.0f;
                count += above;
                if (!above && x[j] >= cut.low) push(shared, x[j], id + j);
                some |= above;
            }
            if (!cut.draw || !__any_sync(~0u, some)) return;
        }
        uint32_t words[Row::WIDTH], most = 0;
        noise.words<Row::WIDTH / 4>(id / 4, words);
#pragma unroll
        for (int j = 0; j < Row::WIDTH; ++j) most = max(most, words[j]);
        if (most < *least_word) return;
        const float scale = __uint_as_float(*bar);
        uint32_t hits = 0;
#pragma unroll
        for (int j = 0; j < Row::WIDTH; ++j) {
            const float p = x[j] > high ? weight(x[j]) : -INFINITE;
            if (two_minus_uniform(words[j]) <= fmaf(p, scale, NEAR_ONE)) hits |= 1u << j;
        }
        if (!hits) return;
        do {
            const int own = id + __ffs(hits) - 1;
            score_token(choice, weight.top, row.at(own), own, best);
            hits &= hits - 1;
        } while (hits);
        const float lower = expf(-best.score) * MARGIN;
        if (__float_as_uint(lower) < atomicMin(&shared.bar, __float_as_uint(lower)) && lower < 0.9f)
            atomicMax(&shared.least_word, ~(static_cast<uint32_t>(lower * 0x1p32f) + 4096u));
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
    return sum_threads(Sums{count, 0, kept, all}, shared.scratch);
}

// Where the sorted list is cut, and the weight of all that is kept. `length` is capped by what fits.
struct Kept {
    int length;
    double weight;
};

__device__ __forceinline__ Kept cut_list(
    Shared& shared, const Weight& weight, const Sums& sums, const Target& target, int length) {
    const int share = (length + blockDim.x - 1) / blockDim.x, first = threadIdx.x * share;
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

// What the first pass left in shared memory: nothing, the histogram, or the sorted list of the highest logits.
enum class Left { NOTHING, HISTOGRAM, LIST };

// The token of a row whose highest logit is `top`. The histogram may be overwritten; the list has at least top_k entries.
template <class Row>
__device__ __forceinline__ int draw_token(
    const Row& row, Shared& shared, const Choice& choice, float top, Left left) {
    const Weight weight(top, choice.temperature);
    const bool few = choice.top_k > 0 && choice.top_k < row.vocab_size, share = choice.top_p < 1;
    Best best;
    Cut cut;
    if (choice.min_p > 0) {
        cut.floor = min_p_floor(shared, choice, top);
        cut.high = next_below(cut.floor);
    }
    const float all_above = cut.high;
    bool counted = left == Left::HISTOGRAM;
    auto score_listed = [&](int length) {
        for (int i = threadIdx.x; i < length; i += blockDim.x)
            score_token(choice, top, listed_value(shared.list[i]), listed_id(shared.list[i]), best);
    };
    if (!few && !share) {
        draw_pass<false>(row, shared, choice, weight, cut, best);
    } else if (few && left == Left::LIST) {
        int length = 0;  // of what min-p leaves
        for (int i = threadIdx.x; i < min(shared.list_length, choice.top_k); i += blockDim.x)
            length += listed_value(shared.list[i]) >= cut.floor;
        length = sum_threads(length, shared.scratch);
        score_listed(cut_list(shared, weight, Sums{}, Target{choice.top_k, choice.top_p, 0}, length).length);
    } else {
        constexpr uint32_t COMFORTABLE = LIST * 3 / 4;
        const uint32_t lowest = order_key(fmaxf(cut.floor, LOWEST));
        Target target{few ? choice.top_k : 0, choice.top_p, 0};
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
                cut.high = fits ? INFINITE : fmaxf(found.high, all_above);
                if (both && !fits) two_steps = true;
            } else {
                two_steps |= target.count && target.limits_weight();
                const Target step = two_steps ? target.only_count() : target;
                const Refined found = refine(row, shared, weight, cut.floor, step, lowest, order_key(top));
                counted = false;
                exact = true;
                cut.low = found.count ? INFINITE : found.low;
                cut.high = found.high;
                cut.tie = found.count ? find_tie(row, shared, found.high, found.count) : -1;
            }
            const Target step = two_steps ? target.only_count() : target;
            cut.draw = !two_steps;
            best = Best{};
            clear_list(shared);
            const Sums sums = draw_pass<true>(row, shared, choice, weight, cut, best);
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
    return reduce_threads(best, Best{}, shared.scratch, better).id;
}
