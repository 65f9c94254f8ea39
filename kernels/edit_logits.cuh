// What a request changes in its logits before a token is chosen, in the order of nf/executors/logit_edits.py: allowed ids,
// bad words, bias, penalties. The edited row is an fp32 copy in scratch memory.
#pragma once
#include "row_stream.cuh"

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

constexpr uint32_t SEEN = 1u << 31;  // in the prompt; the other bits count occurrences in the output

__device__ __forceinline__ void note(uint32_t& seen, bool in_prompt) {
    if (in_prompt)
        atomicOr(&seen, SEEN);
    else
        atomicAdd(&seen, 1u);
}

__device__ __forceinline__ float penalized_value(float value, uint32_t seen, const Edits& edits) {
    if (edits.repetition != 1.0f) value = value > 0 ? value / edits.repetition : __fmul_rn(value, edits.repetition);
    const uint32_t count = seen & ~SEEN;
    if (count) value -= __fadd_rn(__fmul_rn(edits.frequency, static_cast<float>(count)), edits.presence);
    return value;
}

// A short history is counted in a hash table (open addressing), in place of the bins.
__device__ __forceinline__ void penalize_few(float* values, int vocab_size, const Edits& edits, Shared& shared) {
    constexpr int SLOTS = BINS / 2;
    static_assert(SLOTS == 1 << 12, "as many bits as the hash keeps");
    uint32_t *const ids = shared.bins, *const seen = shared.bins + SLOTS;  // id + 1, 0 where there is none
    clear_bins(shared);
    for (int i = threadIdx.x; i < edits.position; i += THREADS) {
        const uint32_t id = static_cast<uint32_t>(edits.history[i]);
        if (id >= static_cast<uint32_t>(vocab_size)) continue;
        uint32_t slot = id * 0x9E3779B1u >> 20;
        for (;; slot = (slot + 1) % SLOTS) {
            const uint32_t there = atomicCAS(&ids[slot], 0u, id + 1);
            if (there == 0 || there == id + 1) break;
        }
        note(seen[slot], i < edits.prompt_len);
    }
    __syncthreads();
    for (int slot = threadIdx.x; slot < SLOTS; slot += THREADS)
        if (ids[slot]) values[ids[slot] - 1] = penalized_value(values[ids[slot] - 1], seen[slot], edits);
}

// Otherwise counts of a range of ids are kept at a time, so the history is read once for each range.
__device__ __forceinline__ void penalize_many(float* values, int vocab_size, const Edits& edits, Shared& shared) {
    for (int begin = 0; begin < vocab_size; begin += BINS) {
        clear_bins(shared);
        for (int i = threadIdx.x; i < edits.position; i += THREADS) {
            const uint32_t at = static_cast<uint32_t>(edits.history[i] - begin);
            if (at < BINS) note(shared.bins[at], i < edits.prompt_len);
        }
        __syncthreads();
        for (int at = threadIdx.x; at < min(BINS, vocab_size - begin); at += THREADS)
            if (shared.bins[at]) values[begin + at] = penalized_value(values[begin + at], shared.bins[at], edits);
    }
}

// The edited row, in `values`, where a copy of it, or −∞ if some ids alone are allowed, stands already; the caller's threads
// see it on return.
template <class Row>
__device__ __forceinline__ Fp32Row edit_row(const Row& row, float* values, const Edits& edits, Shared& shared) {
    auto inside = [&](int id) { return static_cast<uint32_t>(id) < static_cast<uint32_t>(row.vocab_size); };
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
    if (edits.penalized() && edits.position <= BINS / 4)
        penalize_few(values, row.vocab_size, edits, shared);
    else if (edits.penalized())
        penalize_many(values, row.vocab_size, edits, shared);
    global_async_proxy_fence();  // bulk copies will read what this thread has written
    __syncthreads();
    return {values, row.vocab_size};
}
