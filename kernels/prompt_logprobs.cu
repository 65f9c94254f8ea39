// Log-probabilities of given tokens, from raw logits. See sampling.py for the arrays.
//
// Configuration: BF16 (type of the logits; else fp32).
#include "logprobs.cuh"

#if BF16
using LogitsRow = Bf16Row;
using Logit = unsigned short;
#else
using LogitsRow = Fp32Row;
using Logit = float;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2) prompt_logprobs(
    const Logit* logits,  // [stop − start, stride]
    int stride,
    int vocab_size,
    const int* count,     // [1] rows there are in all
    int start,            // rows [start, stop) of what follows are those of `logits`
    int stop,
    const int* targets,   // [*] the tokens
    const int* logprobs,  // [*] how many most likely tokens to report
    float* chosen_logprobs,
    int* ranks,
    int* top_ids,         // [*, MAX_TOP]
    float* top_logprobs) {
    extern __shared__ __align__(128) uint4 shared_memory[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    grid_dependency_launch();
    grid_dependency_wait();
    const int end = min(stop, *count);
    Stream stream(shared);
    auto row_of = [&](int i) { return LogitsRow{logits + static_cast<int64_t>(i - start) * stride, vocab_size}; };
    for (int i = start + blockIdx.x; i < end; i += gridDim.x) {
        const LogitsRow row = row_of(i);
        const Source then = i + static_cast<int>(gridDim.x) < end ? source_of(row_of(i + gridDim.x)) : Source{};
        const Report report{chosen_logprobs, ranks, top_ids, top_logprobs, i};
        const int wanted = logprobs[i];
        stream.prepare(source_of(row));
        const bool lists = wanted > 0 && begin_list(row, shared, wanted);
        const Stats own = lists ? own_stats(row, stream, then, Listing(shared))
                                : own_stats(row, stream, source_of(row), Nothing{});
        keep_stats(shared, join_stats(row, shared, stream, own));
        if (wanted > 0) {
            if (lists && list_suffices(shared, min(wanted, vocab_size)))
                sort_list(shared, shared.list_length);
            else
                list_top(row, shared, stream, false, wanted);
            report_top(shared, vocab_size, wanted, report);
        }
        report_chosen(row, shared, stream, targets[i], false, wanted, report);
    }
    stream.prepare(Source{});  // what was begun in vain must not arrive in another CTA's memory
}
