// What a request changes in its logits before a token is chosen, in the order of nf/executors/logit_edits.py: allowed ids,
// bad words, bias, penalties. The edited row is an fp32 copy in scratch memory.
#pragma once
#include "logits.cuh"

// One row's share of the ragged lists, and its history.
struct Edits {
    const int* allowed_ids;
    int num_allowed;
    const int* words;  // [num_words + 1] where each word's tokens begin
    int num_words;
    const int* word_ids;
    const int* bias_ids;
    const float* bias_values;
    int num_biases;
    const int* history;  // prompt and output
    int position, prompt_len;
    float presence, frequency, repetition;

    __device__ __forceinline__ bool penalized() const {
        return presence != 0.0f || frequency != 0.0f || repetition != 1.0f;
    }
};

// Counts of a range of ids are kept in shared memory, so the history is read once for each range.
__device__ __forceinline__ void penalize(float* values, int vocab_size, const Edits& edits, Shared& shared) {
    constexpr uint32_t SEEN = 1u << 31;  // in the prompt; the other bits count occurrences in the output
    for (int begin = 0; begin < vocab_size; begin += BINS) {
        clear_bins(shared);
        for (int i = threadIdx.x; i < edits.position; i += THREADS) {
            const uint32_t at = static_cast<uint32_t>(edits.history[i] - begin);
            if (at >= BINS) continue;
            if (i < edits.prompt_len)
                atomicOr(&shared.bins[at], SEEN);
            else
                atomicAdd(&shared.bins[at], 1u);
        }
        __syncthreads();
        for (int at = threadIdx.x; at < BINS; at += THREADS) {
            const uint32_t seen = shared.bins[at];
            if (!seen || begin + at >= vocab_size) continue;
            float value = values[begin + at];
            if (edits.repetition != 1.0f) value = value > 0 ? value / edits.repetition : value * edits.repetition;
            const uint32_t count = seen & ~SEEN;
            if (count) value -= __fadd_rn(__fmul_rn(edits.frequency, static_cast<float>(count)), edits.presence);
            values[begin + at] = value;
        }
    }
}

// The edited row, in `values`; the caller's threads see it on return.
template <class Row>
__device__ __forceinline__ Fp32Row edit_row(
    const Row& row, float* values, const Edits& edits, Shared& shared, Stream& stream) {
    auto inside = [&](int id) { return static_cast<uint32_t>(id) < static_cast<uint32_t>(row.vocab_size); };
    __syncthreads();  // the last row's readers are done
    stream.sweep(row, [&](int id, const float (&x)[Row::WIDTH]) {
        if (id >= row.vocab_size) return;
#pragma unroll
        for (int j = 0; j < Row::WIDTH; j += 4)
            *reinterpret_cast<float4*>(values + id + j) = edits.num_allowed
                ? float4{-INFINITE, -INFINITE, -INFINITE, -INFINITE}
                : float4{x[j], x[j + 1], x[j + 2], x[j + 3]};
    });
    __syncthreads();
    for (int i = threadIdx.x; i < edits.num_allowed; i += THREADS)
        if (inside(edits.allowed_ids[i])) values[edits.allowed_ids[i]] = row.at(edits.allowed_ids[i]);
    __syncthreads();
    for (int word = threadIdx.x; word < edits.num_words; word += THREADS) {
        const int* const ids = edits.word_ids + edits.words[word];
        const int before = edits.words[word + 1] - edits.words[word] - 1;  // tokens that must precede the last
        if (before > edits.position || !inside(ids[before])) continue;
        bool ends = true;
        for (int i = 0; i < before && ends; ++i) ends = edits.history[edits.position - before + i] == ids[i];
        if (ends) values[ids[before]] = -INFINITE;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < edits.num_biases; i += THREADS)
        if (inside(edits.bias_ids[i])) values[edits.bias_ids[i]] += edits.bias_values[i];
    __syncthreads();
    if (edits.penalized()) penalize(values, row.vocab_size, edits, shared);
    __syncthreads();
    return {values, row.vocab_size};
}
