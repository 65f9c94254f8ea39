// Log-probabilities, from raw logits, of a chosen token and of the most likely ones.
#pragma once
#include "select.cuh"

// Where the report of row `index` goes.
struct Report {
    float* logprobs;      // [*]
    int* ranks;           // [*] 1 is the most likely
    int* top_ids;         // [*, MAX_TOP] most likely first, the lower id first among equal ones; then −1
    float* top_logprobs;  // [*, MAX_TOP] and −∞ beyond what was asked for
    int index;
};

// List the `count` ≤ MAX_TOP most likely tokens of the row, and perhaps more, sorted. The histogram is of this row if
// `counted`. Returns whether it still is.
template <class Row>
__device__ __forceinline__ bool list_top(const Row& row, Shared& shared, Stream& stream, bool counted, int count) {
    const Weight weight(shared.stats.top, 1.0f);
    const Target target{min(count, row.vocab_size), 1.0f, 0.0};
    float low = counted ? find_bracket(shared, weight, -INFINITE, row.vocab_size, target).low : INFINITE;
    int tie = NONE;
    for (bool bounded = counted;; bounded = true) {
        clear_list(shared);
        if (bounded) {
            stream.sweep(row, [&](int id, const float (&x)[Row::WIDTH]) {
#pragma unroll
                for (int j = 0; j < Row::WIDTH; ++j) {
                    const float value = counted_logit(x[j]);
                    if (value > low || (value == low && id + j <= tie && id + j < row.vocab_size))
                        push(shared, value, id + j);
                }
            });
            __syncthreads();
            const int length = shared.list_length;
            if (!counted || (target.count <= length && length <= LIST)) break;  // refined bounds are exact
        }
        counted = false;
        const uint32_t highest = order_key(fmaxf(shared.stats.top, -INFINITE));
        const Refined found = refine(row, shared, stream, weight, -INFINITE, target, order_key(-INFINITE), highest);
        low = found.low;
        tie = found.count ? find_tie(row, shared, stream, low, found.count) : NONE;
    }
    sort_list(shared, min(shared.list_length, LIST));
    return counted;
}

// Report the `count` ≤ MAX_TOP first entries of the sorted list.
__device__ __forceinline__ void report_top(Shared& shared, int vocab_size, int count, const Report& report) {
    if (threadIdx.x < MAX_TOP) {
        const bool filled = threadIdx.x < min(min(count, vocab_size), shared.list_length);
        const uint64_t entry = shared.list[threadIdx.x];
        const float value = filled ? listed_value(entry) : -INFINITE;
        shared.top_values[threadIdx.x] = value;
        report.top_ids[report.index * MAX_TOP + threadIdx.x] = filled ? listed_id(entry) : -1;
        report.top_logprobs[report.index * MAX_TOP + threadIdx.x] = filled ? shared.stats.logprob(value) : -INFINITE;
    }
    __syncthreads();
}

// Log-probability and rank of a token whose logit is the highest.
__device__ __forceinline__ void report_highest(const Stats& stats, const Report& report) {
    report.logprobs[report.index] = stats.logprob(stats.top);
    report.ranks[report.index] = 1;
}

// Log-probability and rank of a token, once report_top has reported `count` tokens (or 0). `highest` says that the caller
// knows its logit to be the highest.
template <class Row>
__device__ __forceinline__ void report_chosen(
    const Row& row, Shared& shared, Stream& stream, int id, bool highest, int count, const Report& report) {
    const float value = highest ? shared.stats.top : counted_logit(row.at(id));
    int above = 0;
    if (value == shared.stats.top) {
        above = 0;
    } else if (count > 0 && value >= shared.top_values[min(count, row.vocab_size) - 1]) {
        while (shared.top_values[above] > value) ++above;
    } else {
        stream.sweep(row, [&](int, const float (&x)[Row::WIDTH]) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) above += x[j] > value;
        });
        above = sum_threads(above, shared.scratch);
    }
    if (threadIdx.x == 0) {
        report.logprobs[report.index] = shared.stats.logprob(value);
        report.ranks[report.index] = 1 + above;
    }
}
