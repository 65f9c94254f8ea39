// Sampling: one token from each row of logits, and its log-probability. See sampling.py for the arrays and the algorithm.
//
// A CTA takes a row at a time, from a counter, since rows differ in what they ask for. A greedy row is read once.
//
// Configuration: BF16 (type of the logits; else fp32).
#include "draw.cuh"
#include "edit_logits.cuh"
#include "logprobs.cuh"

#if BF16
using LogitsRow = Bf16Row;
using Logit = unsigned short;
#else
using LogitsRow = Fp32Row;
using Logit = float;
#endif

extern "C" __global__ void __launch_bounds__(1024, 1) sample(
    const Logit* logits,  // [*, stride]
    int stride,
    int vocab_size,
    const int* count,  // [1] rows there are
    const int* slots,
    const int* positions,
    const int* prompt_lens,
    const float* temperature,
    const int* top_k,
    const float* top_p,
    const float* min_p,
    const float* presence_penalty,
    const float* frequency_penalty,
    const float* repetition_penalty,
    const uint2* seeds,
    const int* sample_index,
    const int* logprobs,
    const int* bias_indptr,
    const int* bias_ids,
    const float* bias_values,
    const int* allowed_indptr,
    const int* allowed_ids,
    const int* bad_words_indptr,
    const int* bad_words_token_indptr,
    const int* bad_words_ids,
    int* tokens,  // [slots, tokens_stride], the token buffer
    int tokens_stride,
    int* token_ids,           // [*] chosen; −1: nothing to choose from
    float* chosen_logprobs,   // [*]
    int* ranks,               // [*]
    int* top_ids,             // [*, MAX_TOP]
    float* top_logprobs,      // [*, MAX_TOP]
    int* counters,            // [2] rows taken beyond the first of each CTA, CTAs done; 0 between launches
    float* scratch,           // [gridDim.x, scratch_stride] edited rows
    int scratch_stride) {
    extern __shared__ uint4 shared_memory[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    __shared__ Choice choice;
    grid_dependency_launch();
    grid_dependency_wait();
    const int end = *count;
    for (int i = blockIdx.x; i < end; i = shared.next_row) {
        __syncthreads();  // all have read next_row
        if (threadIdx.x == 0) {
            shared.next_row = gridDim.x + atomicAdd(&counters[0], 1);
            const uint2 seed = seeds[i];
            choice = {temperature[i], top_p[i], min_p[i], top_k[i],
                      {seed.x, seed.y, static_cast<uint32_t>(positions[i]), static_cast<uint32_t>(sample_index[i])}};
        }
        __syncthreads();
        const LogitsRow row{logits + static_cast<int64_t>(i) * stride, vocab_size};
        const Report report{chosen_logprobs, ranks, top_ids, top_logprobs, i};
        const int wanted = logprobs[i];
        const bool drawn = choice.temperature > 0;
        const bool edited = presence_penalty[i] != 0.0f || frequency_penalty[i] != 0.0f || repetition_penalty[i] != 1.0f ||
                            bias_indptr[i + 1] > bias_indptr[i] || allowed_indptr[i + 1] > allowed_indptr[i] ||
                            bad_words_indptr[i + 1] > bad_words_indptr[i];
        // Rows that are cut at a rank or at a share of weight get a histogram with the first pass.
        const bool cut = drawn && ((choice.top_k > 0 && choice.top_k < vocab_size) || choice.top_p < 1);

        bool counted = wanted > 0 || (cut && !edited);
        if (counted) {
            begin_histogram(row, shared, drawn ? choice.temperature : 1.0f);
            keep_stats(shared, row_stats<true>(row, shared));
        } else {
            keep_stats(shared, row_stats<false>(row, shared));
        }
        if (wanted > 0) counted = report_top(row, shared, counted, wanted, report);

        auto choose = [&](const auto& of, const Stats& stats) {
            if (!stats.sound()) return -1;
            return drawn ? draw_token(of, shared, choice, stats.top, counted) : first_highest(of, stats);
        };
        auto edit = [&] {
            const int slot = slots[i], words = bad_words_indptr[i];
            const Edits edits{
                allowed_ids + allowed_indptr[i], allowed_indptr[i + 1] - allowed_indptr[i],
                bad_words_token_indptr + words, bad_words_indptr[i + 1] - words, bad_words_ids,
                bias_ids + bias_indptr[i], bias_values + bias_indptr[i], bias_indptr[i + 1] - bias_indptr[i],
                tokens + static_cast<int64_t>(slot) * tokens_stride, positions[i], prompt_lens[i],
                presence_penalty[i], frequency_penalty[i], repetition_penalty[i]};
            return edit_row(row, scratch + static_cast<int64_t>(blockIdx.x) * scratch_stride, edits, shared);
        };
        auto stats_of_edited = [&](const Fp32Row& of) {
            begin_histogram(of, shared, drawn ? choice.temperature : 1.0f);
            counted = true;
            return row_stats<true>(of, shared);
        };
        int token;
        const bool usable = shared.stats.sound();
#if BF16
        if (edited && usable) {
            const Fp32Row changed = edit();
            token = choose(changed, stats_of_edited(changed));
        } else {
            token = choose(row, shared.stats);
        }
#else  // one type of row: the code of drawing need not stand here twice
        LogitsRow chosen_from = row;
        Stats stats = shared.stats;
        if (edited && usable) {
            chosen_from = edit();
            stats = stats_of_edited(chosen_from);
        }
        token = choose(chosen_from, stats);
#endif
        if (wanted >= 0) report_chosen(row, shared, max(token, 0), wanted, report);
        if (threadIdx.x == 0) {
            token_ids[i] = token;
            // The next step may embed it.
            tokens[static_cast<int64_t>(slots[i]) * tokens_stride + positions[i]] = max(token, 0);
        }
        __syncthreads();
    }
    // The last CTA to end leaves the counters as it found them.
    if (threadIdx.x == 0 && atomicInc(reinterpret_cast<unsigned*>(counters + 1), gridDim.x - 1) == gridDim.x - 1)
        counters[0] = 0;
}
