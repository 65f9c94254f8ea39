// Rows of logits: reading them, ordering them, and what one pass over a row tells of it.
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
    uint32_t count;   // values up to and including the bin
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
    uint32_t bar;            // see draw.cuh
    float first_bar, bound;  // the same
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

// Reads rows one after the other. The pieces of a row go round the warps. Each warp has bulk copies bring its pieces ahead
// of time into a ring of slots, where they complete on the slot's barrier: that needs no registers, warps do not wait for
// each other, and L2 is looked up half as often as for copies of 16 bytes by each thread. The end of a row is followed by
// the beginning of what is to be read next, if that is known, so that memory is busy while a CTA makes up its mind.
class Stream {
  public:
    __device__ __forceinline__ explicit Stream(Shared& shared)
        : shared_(shared), slot_(warp_index()) {
        if (lane_index() < SLOTS) barrier_init(barrier() + lane_index() * WARPS * 8, 1);
        barrier_init_fence();
        __syncwarp();
        begin(Source{});
    }

    // Start to copy what is read next, unless that has been done. What was begun in vain is waited for, lest it arrive later.
    __device__ __forceinline__ void prepare(const Source& source) {
        if (begun_ == source.data) return;
#pragma unroll 1
        for (int i = 0; i < SLOTS; ++i) {
            wait();
            step();
        }
        begin(source);
    }

    // Call visit(Batch) round by round. All threads of the CTA come along, some beyond the row's end. `then` is what will be
    // read next; it must not change any more.
    template <class Row, class Visit>
    __device__ __forceinline__ void batches(const Row& row, const Source& then, Visit visit) {
        constexpr int VECTORS = Batch<Row>::VECTORS, STRIDE = Batch<Row>::STRIDE;
        constexpr int ROUND = VECTORS * 32 * 16, ROUNDS = PIECE / ROUND;  // bytes of a round, rounds of a piece
        constexpr int TOKENS = WARPS * (PIECE / 16) * Row::WIDTH;         // of a turn: a piece of each warp
        const Source own = source_of(row);
        prepare(own);
        const int thread = thread_index_anew(), lane = thread % 32;
        Ahead ahead(own, SLOTS, thread / 32);
        Batch<Row> batch;
        batch.id = (thread / 32 * (PIECE / 16) + lane) * Row::WIDTH;
        const int whole = row.vocab_size / TOKENS, turns = max(SLOTS, (row.vocab_size + TOKENS - 1) / TOKENS);
        int turn = 0;
#pragma unroll 1
        for (int begun = 1; begun >= 0; --begun) {  // first while there is more of the row to begin
            if (!begun) ahead = Ahead(then, 0, thread_index_anew() / 32);
#pragma unroll 1
            for (; turn < turns - begun * SLOTS; ++turn) {
                wait();
                uint32_t from = place() + lane * 16;
#pragma unroll 1
                for (int round = 0; round < ROUNDS; ++round) {
                    uint4 v[VECTORS];
#pragma unroll
                    for (int i = 0; i < VECTORS; ++i) v[i] = load_shared_16(from + i * 32 * 16);
                    from += ROUND;
                    if (round == ROUNDS - 1) {
                        __syncwarp();  // all lanes have read the slot
                        copy(ahead);
                        step();
                    }
                    if (turn >= whole) [[unlikely]] {
#pragma unroll
                        for (int i = 0; i < VECTORS; ++i)
                            cut_words(v[i], row.vocab_size - batch.id - i * STRIDE, Row::WIDTH / 4, Row::nothing().x);
                    }
#pragma unroll
                    for (int i = 0; i < VECTORS; ++i) {
                        Row::unpack(v[i], batch.x[i]);
                        batch.highest[i] = Row::highest(v[i]);
                    }
                    visit(batch);
                    batch.id += VECTORS * STRIDE;
                }
                batch.id += (WARPS - 1) * (PIECE / 16) * Row::WIDTH;
            }
        }
        begun_ = then.data;
    }

    // Call visit(first id, values) for every vector.
    template <class Row, class Visit>
    __device__ __forceinline__ void sweep(const Row& row, Visit visit) {
        batches(row, Source{}, [&](const Batch<Row>& batch) {
#pragma unroll
            for (int i = 0; i < batch.VECTORS; ++i) visit(batch.id + i * batch.STRIDE, batch.x[i]);
        });
    }

  private:
    static constexpr uint32_t ODD = 1u << 31;
    Shared& shared_;
    uint32_t slot_;  // where the next piece is, and its successor will be; a warp has every WARPS-th. ODD in odd phases
    const void* begun_ = nullptr;

    // What this warp copies next.
    struct Ahead {
        const char* from;
        int left;  // bytes from there to the end

        __device__ __forceinline__ Ahead(const Source& source, int pieces, int warp) {
            const int offset = (pieces * WARPS + warp) * PIECE;
            from = static_cast<const char*>(source.data) + offset;
            left = source.vectors * 16 - offset;
        }
    };

    __device__ __forceinline__ uint32_t place() const { return shared_address(&shared_ + 1) + slot_ * PIECE; }
    __device__ __forceinline__ uint32_t barrier() const { return shared_address(shared_.arrived) + slot_ * 8; }

    // Every slot has a copy on its way at all times, be it of nothing.
    __device__ __forceinline__ void copy(Ahead& ahead) {
        if (elect_lane()) {
            const int bytes = max(min(ahead.left, PIECE), 0);
            barrier_arrive_expect(barrier(), bytes);
            if (bytes > 0) bulk_copy(place(), ahead.from, bytes, barrier(), EVICT_NORMAL);
        }
        ahead.from += WARPS * PIECE;
        ahead.left -= WARPS * PIECE;
    }

    __device__ __forceinline__ void begin(const Source& source) {
        Ahead ahead(source, 0, thread_index_anew() / 32);
#pragma unroll 1
        for (int i = 0; i < SLOTS; ++i) {
            copy(ahead);
            step();
        }
        slot_ ^= ODD;  // nothing has been waited for
        begun_ = source.data;
    }

    __device__ __forceinline__ void wait() const { barrier_wait(barrier(), slot_ / ODD); }

    __device__ __forceinline__ void step() {
        slot_ += slot_ % 32 < (SLOTS - 1) * WARPS ? WARPS : ODD - (SLOTS - 1) * WARPS;
    }
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

// ---- One pass: maximum, normaliser, histogram ----

__device__ __forceinline__ Stats join(const Stats& a, const Stats& b) {
    Stats both;
    both.top = fmaxf(a.top, b.top);
    const float scaled = scale_logit(both.top);
    both.sum = __fmul_rn(a.sum, exp2_approximate(scale_logit(a.top) - scaled)) +
               __fmul_rn(b.sum, exp2_approximate(scale_logit(b.top) - scaled));  // the same whichever is a
    both.where = min(a.top == both.top ? a.where : NONE, b.top == both.top ? b.where : NONE);
    return both;
}

constexpr int SAMPLED = 2;  // vectors per thread

// Some vectors per thread, spread over the row.
template <class Row>
__device__ __forceinline__ void read_sample(const Row& row, uint4 (&v)[SAMPLED]) {
    const int vectors = (row.vocab_size + Row::WIDTH - 1) / Row::WIDTH;
    const int stride = max(1, vectors / (SAMPLED * THREADS));
#pragma unroll
    for (int i = 0; i < SAMPLED; ++i) v[i] = load_vector(row, (i * THREADS + threadIdx.x) * stride);
}

// How many times as many tokens the row has.
template <class Row>
__device__ __forceinline__ float sample_ratio(const Row& row) {
    return fmaxf(1.0f, static_cast<float>(row.vocab_size) / (SAMPLED * THREADS * Row::WIDTH));
}

// The highest of this thread's sample.
template <class Row>
__device__ __forceinline__ float highest_of(const uint4 (&v)[SAMPLED]) {
    float highest = -INFINITE;
#pragma unroll
    for (int i = 0; i < SAMPLED; ++i) highest = fmaxf(highest, Row::highest(v[i]));
    return highest;
}

// The highest of all threads' samples.
template <class Row>
__device__ __forceinline__ float highest_of_sample(const Row&, const uint4 (&v)[SAMPLED], Shared& shared) {
    return reduce_threads(highest_of<Row>(v), -INFINITE, shared.scratch, [](float a, float b) { return fmaxf(a, b); });
}

__device__ __forceinline__ void clear_bins(Shared& shared) {
    __syncthreads();
    for (int i = threadIdx.x; i < BINS / 4; i += THREADS)  // bin BINS is never read
        reinterpret_cast<uint4*>(shared.bins)[i] = {0, 0, 0, 0};
    __syncthreads();
}

// Before a pass that is Counting. Bins are made for this temperature, and for a highest logit of about `guess`.
__device__ __forceinline__ void begin_histogram(Shared& shared, float guess, float temperature) {
    clear_bins(shared);
    if (threadIdx.x == 0) shared.histogram = Bins(guess, temperature);
    __syncthreads();
}

// Before a pass that is Listing: choose the cut so that the `count` highest logits will be listed and the list will suffice.
// Returns whether that can be expected; it is a guess from a sample.
template <class Row>
__device__ __forceinline__ bool begin_list(const Row& row, Shared& shared, int count) {
    // Of the threads' maxima, the one that many are at or above. The row has about `ratio` times as many.
    const float ratio = sample_ratio(row);
    const float least = count / ratio;
    const int many = static_cast<int>(least + 4.0f * sqrtf(least) + 4.0f);
    clear_list(shared);
    if (many * ratio > LIST * 0.6f || many > THREADS / 4) return false;
    uint4 sample[SAMPLED];
    read_sample(row, sample);
    const uint32_t key = order_key(fmaxf(highest_of<Row>(sample), LOWEST));
    uint32_t cut = 0;
    for (uint32_t bit = 1u << 31; bit >= 1u << 12; bit /= 2)  // the lower bits are not worth their barriers
        if (__syncthreads_count(key >= (cut | bit)) >= many) cut |= bit;
    if (threadIdx.x == 0) shared.cut = fmaxf(key_value(cut), LOWEST);
    __syncthreads();
    return true;
}

// ---- What the first pass does besides ----

struct Nothing {
    template <class Row>
    __device__ __forceinline__ void operator()(const Row&, const Batch<Row>&, float) const {}
};

// Fill shared.bins.
struct Counting {
    Bins bins;
    uint32_t address;

    __device__ __forceinline__ explicit Counting(Shared& shared)
        : bins(shared.histogram), address(shared_address(shared.bins)) {}

    template <class Row>
    __device__ __forceinline__ void operator()(const Row&, const Batch<Row>& batch, float) const {
#pragma unroll
        for (int i = 0; i < batch.VECTORS; ++i) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) bins.count(batch.x[i][j], address);
        }
    }
};

// List the logits from shared.cut on.
struct Listing {
    Shared& shared;
    float cut;

    __device__ __forceinline__ explicit Listing(Shared& shared) : shared(shared), cut(shared.cut) {}

    template <class Row>
    __device__ __forceinline__ void operator()(const Row&, const Batch<Row>& batch, float highest) const {
        if (highest < cut) return;
#pragma unroll
        for (int i = 0; i < batch.VECTORS; ++i) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j)
                if (batch.x[i][j] >= cut) push(shared, batch.x[i][j], batch.id + i * batch.STRIDE + j);
        }
    }
};

// Copy the row as fp32; `blank` writes −∞ instead.
struct Copying {
    float* values;
    bool blank;

    template <class Row>
    __device__ __forceinline__ void store(const Row& row, int id, const float (&x)[Row::WIDTH]) const {
        if (id >= row.vocab_size) return;
#pragma unroll
        for (int j = 0; j < Row::WIDTH; j += 4)
            *reinterpret_cast<float4*>(values + id + j) =
                blank ? float4{-INFINITE, -INFINITE, -INFINITE, -INFINITE} : float4{x[j], x[j + 1], x[j + 2], x[j + 3]};
    }

    template <class Row>
    __device__ __forceinline__ void operator()(const Row& row, const Batch<Row>& batch, float) const {
#pragma unroll
        for (int i = 0; i < batch.VECTORS; ++i) store(row, batch.id + i * batch.STRIDE, batch.x[i]);
    }
};

// Whether the first pass has listed the `count` highest logits, all of them.
__device__ __forceinline__ bool list_suffices(const Shared& shared, int count) {
    return count <= shared.list_length && shared.list_length <= LIST;
}

// One pass over the row: the stats of what this thread has of it. The rest is done by besides(row, batch, the highest logit
// of the batch).
template <class Row, class Besides>
__device__ __forceinline__ Stats own_stats(const Row& row, Stream& stream, const Source& then, const Besides& besides) {
    Stats own;
    float scaled = scale_logit(own.top);
    stream.batches(row, then, [&](const Batch<Row>& batch) {
        float highest = batch.highest[0];
        int where = batch.id;
#pragma unroll
        for (int i = 1; i < batch.VECTORS; ++i) {
            where = batch.highest[i] > highest ? batch.id + i * batch.STRIDE : where;
            highest = fmaxf(highest, batch.highest[i]);
        }
        const float top = fmaxf(own.top, highest);
        const float next = scale_logit(top);
        float part = 0;
#pragma unroll
        for (int i = 0; i < batch.VECTORS; ++i) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) part += scaled_exp(batch.x[i][j], next);
        }
        own.sum = fmaf(own.sum, exp2_approximate(scaled - next), part);
        own.where = highest > own.top ? where : own.where;
        own.top = top;
        scaled = next;
        besides(row, batch, highest);
    });
    return own;
}

// The row's stats, in all threads.
template <class Row>
__device__ __forceinline__ Stats join_stats(const Row& row, Shared& shared, Stream& stream, const Stats& own) {
    Stats all = reduce_threads(own, Stats{}, shared.scratch, join);
    if (all.sum != all.sum) {  // maxima do not hand on NaN, sums do
        float sum = 0;
        stream.sweep(row, [&](int, const float (&x)[Row::WIDTH]) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) sum += x[j] == x[j] ? scaled_exp(x[j], scale_logit(all.top)) : 0.0f;
        });
        all.sum = sum_threads(sum, shared.scratch);
        all.broken = 1;
    }
    return all;
}

// The lowest id of the highest value.
template <class Row>
__device__ __forceinline__ int first_highest(const Row& row, const Stats& stats) {
    float x[Row::WIDTH];
    Row::unpack(load_vector(row, stats.where / Row::WIDTH), x);
    int first = 0;
#pragma unroll
    for (int j = Row::WIDTH - 1; j >= 0; --j)
        if (x[j] == stats.top) first = j;
    return stats.where + first;
}

__device__ __forceinline__ void keep_stats(Shared& shared, const Stats& stats) {
    __syncthreads();
    if (threadIdx.x == 0) shared.stats = stats;
    __syncthreads();
}
