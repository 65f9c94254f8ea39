// Finding the most likely tokens of a row without sorting it.
//
// Tokens are ordered by logit, the lower id first among equal ones, and what is wanted is a prefix of that order: so many
// tokens, or the fewest that have a share of all weight. A histogram of counts, filled while the row was first read, bounds
// the value at which the prefix ends: the weight of a bin lies between its count times the weights of its edges. A second
// pass over the row collects the few tokens within those bounds and sums what is above them; sorted in shared memory, they
// give the end of the prefix exactly. Where too many tokens lie within the bounds — a coarse bin, many equal values —
// `refine` narrows them by histograms over the bits of the floats, and `find_tie` by ids.
//
// A prefix ends at a value: all above it are kept, and of the tokens that have it those up to an id.
#pragma once
#include "first_pass.cuh"

// How long a prefix is wanted. At least one of both limits: a count (0: none), a share of all weight (1: none).
struct Target {
    int count;
    float share;
    double weight;  // the share in weight; 0: not known yet

    __device__ __forceinline__ bool limits_weight() const { return share < 1 || weight > 0; }
    __device__ __forceinline__ double wanted(double all) const { return weight > 0 ? weight : share * all; }
    __device__ __forceinline__ Target only_count() const { return {count, 1.0f, 0.0}; }
};

struct Bracket {
    float low, high;    // the prefix ends at a value within [low, high]
    uint32_t up_to;     // tokens at or above `low`, as far as the histogram tells
};

struct Cumulative {
    uint32_t count;
    float low, high;  // bounds of the weight
};

__device__ __forceinline__ Cumulative operator+(const Cumulative& a, const Cumulative& b) {
    return {a.count + b.count, a.low + b.low, a.high + b.high};
}

struct Mass {
    uint32_t count, unused;
    double weight;
};

__device__ __forceinline__ Mass operator+(const Mass& a, const Mass& b) {
    return {a.count + b.count, 0, a.weight + b.weight};
}

// Bounds from the histogram of the row. Logits below `floor` have no weight.
__device__ __forceinline__ Bracket find_bracket(
    Shared& shared, const Weight& weight, float floor, int vocab_size, const Target& target) {
    const Bins bins = shared.histogram;
    constexpr float ROUNDING = 3e-5f;  // more than what summing in fp32 may lose, relative
    const int share = BINS / THREADS, first = threadIdx.x * share;
    auto edge_weight = [&](int bin) { return weight(bin ? fminf(bins.upper_edge(bin), weight.top) : weight.top); };
    auto visit = [&](auto each) {  // each(bin, its bounds), until it says so
        float upper = edge_weight(first);
        for (int i = 0; i < share; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(&shared.bins[first + i]);
            const uint32_t counts[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int bin = first + i + j;
                const float lower = edge_weight(bin + 1);
                const bool some = bin == 0 || bins.upper_edge(bin) >= floor, whole = bins.upper_edge(bin + 1) >= floor;
                const float count = static_cast<float>(counts[j]);
                if (each(bin, {counts[j], whole ? count * lower : 0.0f, some ? count * upper : 0.0f})) return;
                upper = lower;
            }
        }
    };
    Cumulative own{};
    visit([&](int, const Cumulative& bin) {
        own = own + bin;
        return false;
    });
    Cumulative all;
    const Cumulative before = scan_threads(own, all, shared.scratch);
    const float beneath = bins.upper_edge(BINS) >= floor ? (vocab_size - all.count) * edge_weight(BINS) : 0.0f;
    const float most = (all.high + beneath) * (1 + ROUNDING);
    auto may_end = [&](const Cumulative& c) {  // at the highest
        if (target.count) return c.count >= static_cast<uint32_t>(target.count);
        const float above = c.high * (1 + ROUNDING), beside = fmaxf(all.low - c.low, 0.0f) * (1 - ROUNDING);
        return above >= target.share * (above + beside);
    };
    auto must_end = [&](const Cumulative& c) {
        if (target.count) return c.count >= static_cast<uint32_t>(target.count);
        const float above = c.low * (1 - ROUNDING);
        return above >= target.share * (above + fmaxf(most - c.high * (1 - ROUNDING), 0.0f));
    };
    if (threadIdx.x == 0) shared.crossings[0] = shared.crossings[1] = {BINS, static_cast<uint32_t>(vocab_size)};
    __syncthreads();
    const Cumulative after = before + own;
    bool first_here = !may_end(before) && may_end(after), last_here = !must_end(before) && must_end(after);
    if (first_here || last_here) {
        Cumulative c = before;
        visit([&](int bin, const Cumulative& one) {
            c = c + one;
            if (first_here && may_end(c)) shared.crossings[0] = {bin, c.count}, first_here = false;
            if (last_here && must_end(c)) shared.crossings[1] = {bin, c.count}, last_here = false;
            return !first_here && !last_here;
        });
    }
    __syncthreads();
    const int begin = shared.crossings[0].bin, end = shared.crossings[1].bin;
    const float high = begin == 0 ? INFINITE : bins.upper_edge(begin) + bins.slack();
    const float low = end == BINS ? -INFINITE : bins.upper_edge(end + 1) - bins.slack();
    return {fmaxf(low, floor), high, shared.crossings[1].count};
}

// Where a prefix ends if `low` == `high` and too many tokens have that value: with the `count`-th of them.
struct Refined {
    float low, high;
    uint32_t count;  // 0: the list can hold all tokens in [low, high]
};

// Bounds within the keys [low, high] so close that the list can hold all tokens between them, or equal bounds.
template <class Row>
__device__ __forceinline__ Refined refine(
    const Row& row, Shared& shared, Stream& stream, const Weight& weight, float floor, const Target& target, uint32_t low,
    uint32_t high) {
    constexpr int HALF = BINS / 2;  // bins of counts; as many of weights
    constexpr uint32_t MOST = LIST - 2 * MAX_TOP;
    float* const masses = reinterpret_cast<float*>(shared.bins + HALF);
    for (;;) {
        const uint32_t range = high - low;
        const int shift = range < HALF ? 0 : 32 - __clz(range) - 12;
        clear_bins(shared);
        uint32_t above_count = 0;
        float above = 0, total = 0;
        stream.sweep(row, [&](int id, const float (&x)[Row::WIDTH]) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) {
                const float value = counted_logit(x[j]);
                const uint32_t key = order_key(value);
                const float w = weight(value);
                total += value >= floor ? w : 0.0f;
                if (key > high) {
                    ++above_count;
                    above += w;
                } else if (key >= low && id + j < row.vocab_size) {  // beyond the row's end there is −∞
                    atomicAdd(&shared.bins[(high - key) >> shift], 1u);
                    atomicAdd(&masses[(high - key) >> shift], w);
                }
            }
        });
        const Mass over = sum_threads(Mass{above_count, 0, above}, shared.scratch);
        const double all = sum_threads(static_cast<double>(total), shared.scratch);

        const int share = HALF / THREADS, first = threadIdx.x * share;
        Mass own{}, within;
        for (int i = 0; i < share; ++i) own = own + Mass{shared.bins[first + i], 0, masses[first + i]};
        const Mass before = over + scan_threads(own, within, shared.scratch);
        // Whatever rounding says, the prefix ends within the range.
        const uint32_t count = min(static_cast<uint32_t>(target.count), over.count + within.count);
        const double wanted = min(target.wanted(all), over.weight + within.weight * (1 - 1e-6));
        auto ends = [&](const Mass& m) { return target.count ? m.count >= count : m.weight >= wanted; };
        if (threadIdx.x == 0) shared.crossings[0] = {0, over.count, shared.bins[0], over.weight};
        __syncthreads();
        if (!ends(before) && ends(before + own)) {
            Mass m = before;
            for (int i = 0;; ++i) {
                const Mass one{shared.bins[first + i], 0, masses[first + i]};
                if (ends(m + one) || i == share - 1) {
                    shared.crossings[0] = {first + i, m.count, one.count, m.weight};
                    break;
                }
                m = m + one;
            }
        }
        __syncthreads();
        const Crossing found = shared.crossings[0];
        const uint32_t offset = static_cast<uint32_t>(found.bin) << shift;
        const uint32_t last = min(offset + ((1u << shift) - 1), range);
        low = high - last;
        high = high - offset;
        if (found.inside <= MOST) return {key_value(low), key_value(high), 0};
        if (low == high) {
            const float value = key_value(low);
            if (target.count) return {value, value, count - found.count};
            const double ties = ceil((wanted - found.mass) / static_cast<double>(weight(value)));
            return {value, value, static_cast<uint32_t>(min(max(ties, 1.0), static_cast<double>(found.inside)))};
        }
    }
}

// Id of the `count`-th token that has this value, in the order of ids; the last token's if there are fewer.
template <class Row>
__device__ __forceinline__ int find_tie(const Row& row, Shared& shared, Stream& stream, float value, uint32_t count) {
    int shift = 0;
    while (row.vocab_size - 1 >> shift >= BINS) ++shift;
    clear_bins(shared);
    if (threadIdx.x == 0) shared.tie = row.vocab_size - 1;
    stream.sweep(row, [&](int id, const float (&x)[Row::WIDTH]) {
#pragma unroll
        for (int j = 0; j < Row::WIDTH; ++j)
            if (counted_logit(x[j]) == value && id + j < row.vocab_size) atomicAdd(&shared.bins[(id + j) >> shift], 1u);
    });
    __syncthreads();
    const int share = BINS / THREADS, first = threadIdx.x * share;
    uint32_t own = 0, all;
    for (int i = 0; i < share; ++i) own += shared.bins[first + i];
    uint32_t before = scan_threads(own, all, shared.scratch);
    if (before < count && count <= before + own) {
        int bin = first;
        while (before + shared.bins[bin] < count) before += shared.bins[bin++];
        const int begin = bin << shift, end = min(begin + (1 << shift), row.vocab_size);
        for (int id = begin; id < end && before < count; ++id)
            if (counted_logit(row.at(id)) == value && ++before == count) shared.tie = id;
    }
    __syncthreads();
    return shared.tie;
}

// ---- The list of candidates ----

// Sort the first `length` entries: highest value first, lowest id first among equal ones (bitonic; Batcher 1968).
__device__ __forceinline__ void sort_list(Shared& shared, int length) {
    const int size = length <= 32 ? 32 : 1 << (32 - __clz(length - 1));
    for (int i = length + threadIdx.x; i < size; i += THREADS) shared.list[i] = ~0ull;
    __syncthreads();
    // Exchanges over less than 32 stay within the lanes of a warp.
    auto exchange_lanes = [&](int first_run, int last_run) {
        for (int at = threadIdx.x; at < size; at += THREADS) {
            uint64_t own = shared.list[at];
            for (int run = first_run; run <= last_run; run *= 2) {
                for (int stride = min(run, 32) / 2; stride; stride /= 2) {
                    const uint64_t other =
                        shuffle_words(own, [&](uint32_t word) { return __shfl_xor_sync(~0u, word, stride); });
                    const bool lower = ((at & run) == 0) == ((at & stride) == 0);  // of the two is wanted
                    own = lower == (other < own) ? other : own;
                }
            }
            shared.list[at] = own;
        }
        __syncthreads();
    };
    exchange_lanes(2, 32);
    for (int run = 64; run <= size; run *= 2) {
        for (int stride = run / 2; stride >= 32; stride /= 2) {
            for (int pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                const int at = 2 * pair - (pair & (stride - 1));
                const uint64_t a = shared.list[at], b = shared.list[at + stride];
                if ((a > b) == ((at & run) == 0)) shared.list[at] = b, shared.list[at + stride] = a;
            }
            __syncthreads();
        }
        exchange_lanes(run, run);
    }
}
