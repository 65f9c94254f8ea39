// What one pass over a row tells: the maximum and the normaliser, and what else the pass does besides.
#pragma once
#include "row_stream.cuh"

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
