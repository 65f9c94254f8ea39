// Rows of logits: reading them, ordering them, and what one pass over a row tells of it.
#pragma once
#include "memory.cuh"
#include "reduce.cuh"

constexpr float INFINITE = __builtin_bit_cast(float, 0x7F800000u);
constexpr float LOWEST = -1e30f;  // logits have to be above; what is not counts as −∞
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int NONE = 0x7FFFFFFF;

constexpr int BINS = 8192;  // of a histogram
constexpr int LIST = 2048;  // candidates that are sorted in shared memory
constexpr int MAX_TOP = 20;

struct Crossing {
    int bin;
    uint32_t count;   // values up to and including the bin
    uint32_t inside;  // values in it
    double mass;      // weights before it
};

// What one pass tells of a row. `sum` is of scaled_exp(x, top · log₂ e). NaN counts as −∞, and makes the row `broken`.
struct Stats {
    float top = LOWEST;
    float sum = 0;
    int where = NONE;  // first id of the first vector that holds the highest value
    int broken = 0;

    __device__ __forceinline__ bool sound() const { return !broken && LOWEST < top && top < INFINITE; }
    // ln Σ exp(x − top); what rounding took from top · log₂ e is given back.
    __device__ __forceinline__ float log_sum() const {
        return (log2f(sum) - fmaf(top, LOG2_E, -(top * LOG2_E))) * LN_2;
    }
    __device__ __forceinline__ float logprob(float x) const { return (x - top) - log_sum(); }
};

// 2^(x·log₂ e − scaled): exp(x − top) but for the rounding of scaled = top · log₂ e.
__device__ __forceinline__ float scaled_exp(float x, float scaled) {
    return exp2_approximate(fmaf(x, LOG2_E, -scaled));
}

// Equal bins from `anchor` downwards; bin 0 has what is above as well, and what is below the last bin is left out.
struct Bins {
    static constexpr float PER_UNIT = 170, ABOVE = 20;  // 8192 bins are 48 units, ABOVE of them over the first maximum
    float anchor, width, scale;

    Bins() = default;

    // `guess` is about the highest logit. The wider of a unit of logit and a unit of temperature counts.
    __device__ __forceinline__ Bins(float guess, float temperature) {
        const float unit = fmaxf(1.0f, temperature);
        anchor = (fabsf(guess) < INFINITE ? guess : 0.0f) + ABOVE * unit;
        width = unit / PER_UNIT;
        scale = PER_UNIT / unit;
    }

    // Adding 2²³, whose last bit is 1, rounds to an integer, which is monotone. What is left out goes to bin BINS.
    __device__ __forceinline__ void count(float x, uint32_t bins_address) const {
        const float bin = fminf(fmaf(fmaxf(anchor - x, 0.0f), scale, 0x1p23f), 0x1p23f + BINS);
        const uint32_t address = __float_as_uint(bin) * 4 + (bins_address - 0x2C000000u);  // 4 · bits of 2²³, mod 2³²
        add_shared(address, 1);
    }

    __device__ __forceinline__ float upper_edge(int bin) const { return anchor - (bin - 0.5f) * width; }
    // How far rounding may carry a value over an edge.
    __device__ __forceinline__ float slack() const { return 0.01f * width + 4e-7f * fabsf(anchor); }
};

// All shared memory of a CTA.
struct Shared {
    uint32_t bins[BINS + 4];  // the last four: a place for what is in no bin
    uint64_t list[LIST];
    double scratch[3 * 32];  // of reductions
    Crossing crossings[2];
    float top_values[MAX_TOP];
    int list_length;
    uint32_t bar;  // see draw.cuh
    int next_row;
    float floor;
    int tie;
    Stats stats;    // of the raw logits
    Bins histogram; // of the row whose bins these are
};

// ---- Rows ----

struct Bf16Row {
    static constexpr int WIDTH = 8;  // values of a vector
    const unsigned short* data;
    int vocab_size;

    __device__ __forceinline__ float at(int id) const { return __uint_as_float(static_cast<uint32_t>(data[id]) << 16); }
    __device__ __forceinline__ static uint4 nothing() { return {0xFF80FF80u, 0xFF80FF80u, 0xFF80FF80u, 0xFF80FF80u}; }
    __device__ __forceinline__ static void unpack(const uint4& v, float (&x)[WIDTH]) { unpack_bf16(v, x); }
};

struct Fp32Row {
    static constexpr int WIDTH = 4;
    const float* data;
    int vocab_size;

    __device__ __forceinline__ float at(int id) const { return data[id]; }
    __device__ __forceinline__ static uint4 nothing() { return {0xFF800000u, 0xFF800000u, 0xFF800000u, 0xFF800000u}; }
    __device__ __forceinline__ static void unpack(const uint4& v, float (&x)[WIDTH]) {
        x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
        x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
    }
};

// The row's last vector, with −∞ for what comes after the last token.
__device__ __forceinline__ void cut_words(uint4& v, int tokens, int per_word, uint32_t nothing) {
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (tokens <= i * per_word) words[i] = nothing;
        if (per_word == 2 && tokens == 2 * i + 1) words[i] = (words[i] & 0xFFFFu) | (nothing & 0xFFFF0000u);
    }
    v = {words[0], words[1], words[2], words[3]};
}

// Vector `vector` of the row; −∞ where there are no tokens.
template <class Row>
__device__ __forceinline__ uint4 load_vector(const Row& row, int vector) {
    const int left = row.vocab_size - vector * Row::WIDTH;
    if (left <= 0) return Row::nothing();
    uint4 v = load_16(reinterpret_cast<const uint4*>(row.data) + vector);
    if (left < Row::WIDTH) [[unlikely]] cut_words(v, left, Row::WIDTH / 4, Row::nothing().x);
    return v;
}

// Call visit(first id, values) for every vector of the row. Lanes of a warp call it together, some beyond the row's end.
template <int UNROLL, class Row, class Visit>
__device__ __forceinline__ void sweep(const Row& row, Visit visit) {
    const int vectors = (row.vocab_size + Row::WIDTH - 1) / Row::WIDTH;
    for (int base = 0; base < vectors; base += blockDim.x * UNROLL) {
        uint4 v[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) v[i] = load_vector(row, base + i * blockDim.x + threadIdx.x);
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            float x[Row::WIDTH];
            Row::unpack(v[i], x);
            visit((base + i * blockDim.x + threadIdx.x) * Row::WIDTH, x);
        }
    }
}

// ---- Order ----

// Unsigned integers in the order of the floats, equal for both zeros; NaN is beyond the infinities.
__device__ __forceinline__ uint32_t order_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits ^ (static_cast<int>(bits) < 0 ? ~0u : 0x80000000u);
}

__device__ __forceinline__ float key_value(uint32_t key) {
    return __uint_as_float(key ^ (static_cast<int>(key) < 0 ? 0x80000000u : ~0u));
}

// Weight of a logit under softmax, in units of the highest one's.
struct Weight {
    float top;     // the highest logit
    float factor;  // log₂ e / temperature

    __device__ __forceinline__ Weight(float top, float temperature)
        : top(top), factor(fminf(LOG2_E / temperature, 1e30f)) {}  // (top − top) · factor stays 0
    __device__ __forceinline__ float operator()(float x) const { return exp2_approximate((x - top) * factor); }
};

// ---- One pass: maximum, normaliser, histogram ----

__device__ __forceinline__ Stats join(const Stats& a, const Stats& b) {
    Stats both;
    both.top = fmaxf(a.top, b.top);
    const float scaled = both.top * LOG2_E;
    both.sum = a.sum * exp2_approximate(a.top * LOG2_E - scaled) + b.sum * exp2_approximate(b.top * LOG2_E - scaled);
    both.where = min(a.top == both.top ? a.where : NONE, b.top == both.top ? b.where : NONE);
    return both;
}

// Highest of the first vectors, one per thread.
template <class Row>
__device__ __forceinline__ float first_maximum(const Row& row, Shared& shared) {
    float highest = -INFINITE;
    float x[Row::WIDTH];
    Row::unpack(load_vector(row, threadIdx.x), x);
#pragma unroll
    for (int j = 0; j < Row::WIDTH; ++j) highest = fmaxf(highest, x[j]);
    return reduce_threads(highest, -INFINITE, shared.scratch, [](float a, float b) { return fmaxf(a, b); });
}

__device__ __forceinline__ void clear_bins(Shared& shared) {
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) shared.bins[i] = 0;  // bin BINS is never read
    __syncthreads();
}

// Before row_stats<true>. Bins are made for this temperature.
template <class Row>
__device__ __forceinline__ void begin_histogram(const Row& row, Shared& shared, float temperature) {
    clear_bins(shared);
    const float guess = first_maximum(row, shared);
    if (threadIdx.x == 0) shared.histogram = Bins(guess, temperature);
    __syncthreads();
}

// COUNT also fills shared.bins; they are complete on return.
template <bool COUNT, class Row>
__device__ __forceinline__ Stats row_stats(const Row& row, Shared& shared) {
    const Bins bins = COUNT ? shared.histogram : Bins();
    Stats own;
    float scaled = own.top * LOG2_E;
    const uint32_t bins_address = shared_address(shared.bins);
    sweep<4>(row, [&](int id, const float (&x)[Row::WIDTH]) {
        float highest = x[0];
#pragma unroll
        for (int j = 1; j < Row::WIDTH; ++j) highest = fmaxf(highest, x[j]);
        const float top = fmaxf(own.top, highest);
        const float next = top * LOG2_E;
        float part = 0;
#pragma unroll
        for (int j = 0; j < Row::WIDTH; ++j) part += scaled_exp(x[j], next);
        own.sum = fmaf(own.sum, exp2_approximate(scaled - next), part);
        own.where = highest > own.top ? id : own.where;
        own.top = top;
        scaled = next;
        if constexpr (COUNT) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) bins.count(x[j], bins_address);
        }
    });
    Stats all = reduce_threads(own, Stats{}, shared.scratch, join);
    if (all.sum != all.sum) {  // maxima do not hand on NaN, sums do
        float sum = 0;
        sweep<1>(row, [&](int, const float (&x)[Row::WIDTH]) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) sum += x[j] == x[j] ? scaled_exp(x[j], all.top * LOG2_E) : 0.0f;
        });
        all.sum = sum_threads(sum, shared.scratch);
        all.broken = 1;
    }
    return all;
}

// The lowest id of the highest value.
template <class Row>
__device__ __forceinline__ int first_highest(const Row& row, const Stats& stats) {
    int id = stats.where;
    while (row.at(id) != stats.top) ++id;
    return id;
}

__device__ __forceinline__ void keep_stats(Shared& shared, const Stats& stats) {
    __syncthreads();
    if (threadIdx.x == 0) shared.stats = stats;
    __syncthreads();
}
