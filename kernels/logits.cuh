// Rows of logits, their order and weight, and what a CTA that samples from them has in shared memory.
#pragma once
#include "memory.cuh"
#include "reduce.cuh"

constexpr uint32_t INFINITE_BITS = 0x7F800000u;
constexpr float INFINITE = __builtin_bit_cast(float, INFINITE_BITS);
constexpr float LOWEST = -1e30f;  // logits have to be above; what is not counts as −∞
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int NONE = 0x7FFFFFFF;

constexpr int BINS = 8192;  // of a histogram
constexpr int LIST = 2048;  // candidates that are sorted in shared memory
constexpr int MAX_TOP = 20;
// Two CTAs share a multiprocessor, with so few threads that what is at hand stays in registers: a spilled value would be
// read through the same queues as the rows, which costs microseconds when they are full.
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PIECE = 2048;  // bytes of a bulk copy
constexpr int SLOTS = 3;     // pieces per warp on their way

struct Crossing {
    int bin;
    uint32_t count;   // values up to and including the bin; in refine, before it
    uint32_t inside;  // values in it
    double mass;      // weights before it
};

// x · log₂ e, rounded. Sums are taken relative to the rounded product, so the compiler must not fuse it into what follows:
// 2^(a − b) of equal a and b, far from 0, has to be 1.
__device__ __forceinline__ float scale_logit(float x) { return __fmul_rn(x, LOG2_E); }

// What one pass tells of a row. `sum` is of scaled_exp(x, top · log₂ e). NaN counts as −∞, and makes the row `broken`.
struct Stats {
    float top = LOWEST;
    float sum = 0;
    int where = NONE;  // first id of the first vector that holds the highest value
    int broken = 0;

    __device__ __forceinline__ bool sound() const { return !broken && LOWEST < top && top < INFINITE; }
    // ln Σ exp(x − top); what rounding took from top · log₂ e is given back.
    __device__ __forceinline__ float log_sum() const {
        return (log2f(sum) - fmaf(top, LOG2_E, -scale_logit(top))) * LN_2;
    }
    __device__ __forceinline__ float logprob(float x) const { return (x - top) - log_sum(); }
    // Σ exp(x − top).
    __device__ __forceinline__ float mass() const { return sum * exp2_approximate(fmaf(-top, LOG2_E, scale_logit(top))); }
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

// Shared memory of a CTA; the rings of its warps follow.
struct alignas(128) Shared {
    uint32_t bins[BINS + 4];  // the last four: a place for what is in no bin
    uint64_t list[LIST];
    double scratch[4 * 32];  // of reductions
    Crossing crossings[2];
    float top_values[MAX_TOP];
    int list_length;
    uint32_t bar;            // of bar.cuh: b as an order_key in draw_first.cuh, the bits of exp(−b) in draw.cuh
    float first_bar, bound;  // see draw_first.cuh
    float floor;
    int tie;
    float cut;       // logits from here on are listed
    Stats stats;     // of the raw logits
    Bins histogram;  // what the bins are
    uint64_t arrived[SLOTS * WARPS];  // barriers of the rings
};
static_assert(sizeof(Shared) <= 51 * 1024, "what sampling.py asks for at the launch, beside the rings");

// The logit; −∞ for NaN.
__device__ __forceinline__ float counted_logit(float x) { return fmaxf(x, -INFINITE); }

// ---- Rows ----

struct Bf16Row {
    static constexpr int WIDTH = 8;  // values of a vector
    const unsigned short* data;
    int vocab_size;

    __device__ __forceinline__ float at(int id) const { return __uint_as_float(static_cast<uint32_t>(data[id]) << 16); }
    __device__ __forceinline__ static uint4 nothing() { return {0xFF80FF80u, 0xFF80FF80u, 0xFF80FF80u, 0xFF80FF80u}; }
    __device__ __forceinline__ static void unpack(const uint4& v, float (&x)[WIDTH]) { unpack_bf16(v, x); }
    __device__ __forceinline__ static float highest(const uint4& v) {
        const uint32_t both = max_bf16(max_bf16(v.x, v.y), max_bf16(v.z, v.w));
        return fmaxf(bf16_low(both), bf16_high(both));
    }
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
    __device__ __forceinline__ static float highest(const uint4& v) {
        return fmaxf(fmaxf(__uint_as_float(v.x), __uint_as_float(v.y)), fmaxf(__uint_as_float(v.z), __uint_as_float(v.w)));
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

// Vector `vector` of the row, read at once; −∞ where there are no tokens.
template <class Row>
__device__ __forceinline__ uint4 load_vector(const Row& row, int vector) {
    const int left = row.vocab_size - vector * Row::WIDTH;
    if (left <= 0) return Row::nothing();
    uint4 v = load_16(reinterpret_cast<const uint4*>(row.data) + vector);
    if (left < Row::WIDTH) [[unlikely]] cut_words(v, left, Row::WIDTH / 4, Row::nothing().x);
    return v;
}

// What is to be read: vectors of 16 bytes.
struct Source {
    const void* data = nullptr;
    int vectors = 0;
};

template <class Row>
__device__ __forceinline__ Source source_of(const Row& row) {
    return {row.data, (row.vocab_size + Row::WIDTH - 1) / Row::WIDTH};
}

// By value: a choice between references would put both into local memory.
__device__ __forceinline__ Source either(bool first, const Source& a, const Source& b) {
    return {first ? a.data : b.data, first ? a.vectors : b.vectors};
}

// What a thread has of a row in one round: VECTORS vectors, those of a warp side by side, −∞ beyond the row's end. Ids grow
// from vector to vector and from round to round.
template <class Row>
struct Batch {
    static constexpr int VECTORS = 16 / Row::WIDTH;
    static constexpr int STRIDE = 32 * Row::WIDTH;  // tokens from a vector to the next
    int id;                                         // of the first token
    float x[VECTORS][Row::WIDTH];
    float highest[VECTORS];
};

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

// ---- The list of candidates ----

__device__ __forceinline__ void clear_list(Shared& shared) {
    __syncthreads();
    if (threadIdx.x == 0) shared.list_length = 0;
    __syncthreads();
}

// The length goes on counting when the list is full.
__device__ __forceinline__ void push(Shared& shared, float value, int id) {
    const int at = atomicAdd(&shared.list_length, 1);
    if (at < LIST) shared.list[at] = static_cast<uint64_t>(~order_key(value)) << 32 | static_cast<uint32_t>(id);
}

__device__ __forceinline__ float listed_value(uint64_t entry) { return key_value(~static_cast<uint32_t>(entry >> 32)); }
__device__ __forceinline__ int listed_id(uint64_t entry) { return static_cast<int>(static_cast<uint32_t>(entry)); }
