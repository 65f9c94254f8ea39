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

struct RowScalars {
    Choice choice;
    int wanted, slot;
    float presence, frequency, repetition;
    int biases[2], allowed[2], words[2];  // where the row's begin and end

    __device__ __forceinline__ bool edited() const {
        return presence != 0.0f || frequency != 0.0f || repetition != 1.0f || biases[1] > biases[0] ||
               allowed[1] > allowed[0] || words[1] > words[0];
    }
};

struct SamplingArrays {  // as in sampling.py; one argument, for the host's sake
    const int* count;    // [1] rows there are
    const int* slots;
    const int* positions;
    const int* prompt_lens;
    const float* temperature;
    const int* top_k;
    const float* top_p;
    const float* min_p;
    const float* presence_penalty;
    const float* frequency_penalty;
    const float* repetition_penalty;
    const uint2* seeds;
    const int* sample_index;
    const int* logprobs;
    const int* bias_indptr;
    const int* bias_ids;
    const float* bias_values;
    const int* allowed_indptr;
    const int* allowed_ids;
    const int* bad_words_indptr;
    const int* bad_words_token_indptr;
    const int* bad_words_ids;
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) sample(
    const Logit* logits,  // [*, stride]
    int stride,
    int vocab_size,
    const SamplingArrays arrays,
    int* tokens,  // [slots, tokens_stride], the token buffer
    int tokens_stride,
    int* token_ids,           // [*] chosen; −1: nothing to choose from
    float* chosen_logprobs,   // [*]
    int* ranks,               // [*]
    int* top_ids,             // [*, MAX_TOP]
    float* top_logprobs,      // [*, MAX_TOP]
    int* counters,            // [2] rows taken beyond the first two of each CTA, CTAs done; 0 between launches
    float* scratch,           // [gridDim.x, scratch_stride] edited rows
    int scratch_stride) {
    extern __shared__ __align__(128) uint4 shared_memory[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    // Scalars of the rows at hand and next, copied ahead of time: a row begins without waiting for memory.
    __shared__ RowScalars scalars[2];
    __shared__ int next_rows[2];
    grid_dependency_launch();
    const int end = load_input(arrays.count);
    auto fetch = [&](int i, RowScalars& into) {
        if (threadIdx.x != 0 || i >= end) return;
        copy_4(&into.choice.temperature, arrays.temperature + i);
        copy_4(&into.choice.top_p, arrays.top_p + i);
        copy_4(&into.choice.min_p, arrays.min_p + i);
        copy_4(&into.choice.top_k, arrays.top_k + i);
        copy_4(&into.choice.noise.key0, &arrays.seeds[i].x);
        copy_4(&into.choice.noise.key1, &arrays.seeds[i].y);
        copy_4(&into.choice.noise.position, arrays.positions + i);
        copy_4(&into.choice.noise.sample, arrays.sample_index + i);
        copy_4(&into.wanted, arrays.logprobs + i);
        copy_4(&into.slot, arrays.slots + i);
        copy_4(&into.presence, arrays.presence_penalty + i);
        copy_4(&into.frequency, arrays.frequency_penalty + i);
        copy_4(&into.repetition, arrays.repetition_penalty + i);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            copy_4(&into.biases[j], arrays.bias_indptr + i + j);
            copy_4(&into.allowed[j], arrays.allowed_indptr + i + j);
            copy_4(&into.words[j], arrays.bad_words_indptr + i + j);
        }
    };
    auto row_of = [&](int i) { return LogitsRow{logits + static_cast<int64_t>(i) * stride, vocab_size}; };
    auto source_at = [&](int i) { return i < end ? source_of(row_of(i)) : Source{}; };
    // What describes the rows is an input of the step; the kernel before writes logits and may still write tokens.
    fetch(blockIdx.x, scalars[0]);
    copies_commit();
    // Rows are taken one ahead as well. The first two of each CTA are given.
    if (threadIdx.x == 0) next_rows[0] = blockIdx.x + gridDim.x;
    grid_dependency_wait();
    Stream stream(shared);
    stream.prepare(source_at(blockIdx.x));
    int parity = 0;
    for (int i = blockIdx.x; i < end; parity ^= 1) {
        copies_wait<0>();  // for the scalars
        __syncthreads();
        const int next = next_rows[parity];
        fetch(next, scalars[parity ^ 1]);
        copies_commit();
        int after_next = 0;
        if (threadIdx.x == 0 && next < end) after_next = 2 * gridDim.x + atomicAdd(&counters[0], 1);

        const RowScalars& own = scalars[parity];
        const Choice& choice = own.choice;
        const LogitsRow row = row_of(i);
        const Report report{chosen_logprobs, ranks, top_ids, top_logprobs, i};
        const int wanted = own.wanted, position = static_cast<int>(choice.noise.position);
        auto write_token = [&](int row_index, int token) {
            token_ids[row_index] = token;
            tokens[static_cast<int64_t>(own.slot) * tokens_stride + position] = max(token, 0);  // may be embedded next
        };
        const bool drawn = choice.temperature > 0, edited = own.edited();
        const bool few = drawn && choice.limits_count(vocab_size), share = drawn && choice.limits_share();

        // What is read after the last pass over this row, as far as can be told, and after any other.
        auto again = [&] { return source_of(row); };
        auto last = [&] { return either(drawn && wanted >= 0, again(), source_at(next)); };

        // A pass over what is drawn from, raw or edited, that prepares for the drawing as well as it can. (Inlined: a call would
        // keep in memory what is captured.)
        Left left = Left::NOTHING;
        auto first_pass = [&](const auto& of) __attribute__((always_inline)) {
            const Source same = source_of(of);
            stream.prepare(same);
            const bool may_draw = may_draw_first(choice, vocab_size) && (wanted <= 0 || edited);
            if (may_draw || few || share) {
                uint4 sample[SAMPLED];
                read_sample(of, sample);
                const float highest = highest_of_sample(of, sample, shared);
                const Drawing drawing(shared, choice);
                if (may_draw && drawing.begin(of, sample, highest)) {
                    left = Left::CANDIDATES;
                    return own_stats(of, stream, either(share, same, last()), drawing);
                }
                left = Left::HISTOGRAM;
                begin_histogram(shared, highest, choice.temperature);
                return own_stats(of, stream, same, Counting(shared));
            }
            left = Left::NOTHING;
            return own_stats(of, stream, either(drawn || (wanted > 0 && !edited), same, last()), Nothing{});
        };

        // Where a known number of the highest raw logits will do, the first pass lists these; a row to be edited it copies.
        const int listed = min(max(wanted, few && !edited ? choice.top_k : 0), vocab_size);
        const bool plain = !drawn && !edited && wanted <= 0;
        const bool lists = listed > 0 && (few || !share || edited) && begin_list(row, shared, listed);
        const Copying copying{scratch + static_cast<int64_t>(blockIdx.x) * scratch_stride, own.allowed[1] > own.allowed[0]};
        Stats part;
        if (lists) {
            part = own_stats(row, stream, either(!edited && (!drawn || few), last(), again()), Listing(shared));
        } else if (edited) {
            part = own_stats(row, stream, Source{}, copying);
        } else {
            part = first_pass(row);
        }
        const Stats raw = join_stats(row, shared, stream, part);
        if (threadIdx.x == 0) next_rows[parity ^ 1] = after_next;
        if (plain && (raw.sound() || wanted < 0)) {
            // One thread reads the token's neighbours again; the others go on.
            if (threadIdx.x == THREADS - 1) {
                const int token = raw.sound() ? first_highest(row, raw) : -1;
                if (wanted >= 0) report_highest(raw, report);
                write_token(i, token);
            }
            i = next;
            continue;
        }
        keep_stats(shared, raw);
        if (lists && list_suffices(shared, listed)) {
            left = Left::LIST;
            sort_list(shared, shared.list_length);
        }
        if (wanted > 0) {
            if (left != Left::LIST && !list_top(row, shared, stream, left == Left::HISTOGRAM, wanted)) left = Left::NOTHING;
            report_top(shared, vocab_size, wanted, report);
        }

        auto choose = [&](const auto& of, const Stats& stats, Left of_first) __attribute__((always_inline)) {
            if (!stats.sound()) return -1;
            return drawn ? draw_token(of, shared, stream, choice, stats, of_first, last) : first_highest(of, stats);
        };
        auto edit = [&] {
            const Edits edits{
                arrays.allowed_ids + own.allowed[0], own.allowed[1] - own.allowed[0],
                arrays.bad_words_token_indptr + own.words[0], own.words[1] - own.words[0], arrays.bad_words_ids,
                arrays.bias_ids + own.biases[0], arrays.bias_values + own.biases[0], own.biases[1] - own.biases[0],
                tokens + static_cast<int64_t>(own.slot) * tokens_stride, position, arrays.prompt_lens[i],
                own.presence, own.frequency, own.repetition};
            if (lists)
                stream.sweep(row, [&](int id, const float (&x)[LogitsRow::WIDTH]) { copying.store(row, id, x); });
            return edit_row(row, copying.values, edits, shared);
        };
        int token;
        const bool usable = shared.stats.sound();
#if BF16
        if (edited && usable) {
            const Fp32Row changed = edit();
            const Stats stats = join_stats(changed, shared, stream, first_pass(changed));
            token = choose(changed, stats, left);
        } else {
            token = choose(row, shared.stats, left);
        }
#else  // one type of row: the code of drawing need not stand here twice
        LogitsRow chosen_from = row;
        Stats stats = shared.stats;
        if (edited && usable) {
            chosen_from = edit();
            stats = join_stats(chosen_from, shared, stream, first_pass(chosen_from));
        }
        token = choose(chosen_from, stats, left);
#endif
        if (wanted >= 0) report_chosen(row, shared, stream, max(token, 0), !drawn && !edited && usable, wanted, report);
        if (threadIdx.x == 0) write_token(i, token);
        i = next;
        stream.prepare(source_at(i));
    }
    // The last CTA to end leaves the counters as it found them.
    __threadfence();
    if (threadIdx.x == 0 && atomicInc(reinterpret_cast<unsigned*>(counters + 1), gridDim.x - 1) == gridDim.x - 1)
        counters[0] = 0;
}
