"""The GPU executor against a dense float64 model and the CPU's sampler: configurations, plans, pages, faults."""

from __future__ import annotations

import dataclasses
import gc
import threading
from pathlib import Path
from random import Random

import numpy as np
import pytest
from executor_cases import (
    Part,
    all_logits,
    random_plan,
    reference_logits,
    sampling_batch,
)
from gpu_runs import (
    MAX_LEN,
    SLOTS,
    gpu_executor,
    maker,
    map_weights,
    model_for_gpu,
    partitioned_plan,
    plans,
    relative_error,
    weights_for_gpu,
)

from nf.config import RopeConfig
from nf.errors import EngineError, ModelError
from nf.executors import gpu_trace
from nf.executors.cpu_sampling import sample
from nf.executors.gpu import GpuExecutor
from nf.graphs.plan import nano_batch_plan, sequential_plan, unroll
from nf.kernels.device import Device, DeviceMemoryError
from nf.scheduler.batch import Batch, PromptLogprobsBatch, SamplingBatch

pytestmark = pytest.mark.gpu

ERROR = 2e-2  # relative, of the logits of a position: bf16 against float64
DENSE = 300  # more than the largest graph of a smaller size, so that large batches run the plan itself
MODEL = model_for_gpu()
WEIGHTS = weights_for_gpu(MODEL, 0)
LENGTHS = (21, 3, 60, 33, 150, 130)  # the last two fill a dense batch together
PROMPT = np.random.default_rng(0).integers(0, 272, 21).tolist()


def random_sequences(seed: int, longest: int = MAX_LEN, slots: int = SLOTS) -> dict[int, list[int]]:
    rng = np.random.default_rng(seed)
    lengths = [longest, *rng.integers(1, longest + 1, slots - 1).tolist()]
    return {slot: rng.integers(0, 272, length).tolist() for slot, length in enumerate(lengths)}


def random_ids(seed: int) -> dict[int, list[int]]:
    """Sequences of MAX_LEN tokens."""
    return {slot: np.random.default_rng([seed, slot]).integers(0, 272, MAX_LEN).tolist() for slot in range(SLOTS)}


def check_logits(found: dict[int, np.ndarray], sequences: dict[int, list[int]], model=MODEL, weights=WEIGHTS) -> None:
    for slot, ids in sequences.items():
        assert relative_error(found[slot], reference_logits(model, weights, ids)) <= ERROR


def last_logits(ids: list[int], weights=WEIGHTS) -> np.ndarray:
    return reference_logits(MODEL, weights, ids)[-1]


def tokens_of(run: GpuExecutor, batch: Batch) -> list[int]:
    return run.submit(batch).result().token_ids.tolist()


CONFIGS = {
    "llama": {},
    "one head per KV head": {"num_heads": 2, "num_kv_heads": 2},
    "eight heads per KV head": {"num_heads": 8, "num_kv_heads": 1},
    "three heads per KV head, wide": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 128},
    "linear rope": {"rope": RopeConfig(theta=500.0, kind="linear", factor=4.0)},
    "llama3 rope": {"rope": RopeConfig(kind="llama3", theta=50.0, factor=8.0, original_max_position_embeddings=64)},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "qkv_bias": True, "hidden_size": 320},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "tie_word_embeddings": True, "head_dim": 128},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 40},
    "mixtral": {"architecture": "MixtralForCausalLM", "num_experts": 8, "experts_per_token": 2},
    "mixtral, many small experts": {
        "architecture": "MixtralForCausalLM", "num_experts": 20, "experts_per_token": 4, "intermediate_size": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_a_dense_float64_model(name: str) -> None:
    """Random chunks and decodes, in steps of every size."""
    model = model_for_gpu(**CONFIGS[name])
    weights, sequences = weights_for_gpu(model, 1), random_sequences(1)
    with gpu_executor(model, weights, nano_batch_plan(model.operations, DENSE)) as run:
        check_logits(all_logits(run, maker(), sequences, DENSE, 1), sequences, model, weights)


@pytest.mark.parametrize("page_size", [32, 64])
def test_other_page_sizes(page_size: int) -> None:
    sequences = random_sequences(2)
    with gpu_executor(MODEL, WEIGHTS, DENSE, page_size=page_size) as run:
        check_logits(all_logits(run, maker(page_size), sequences, DENSE, 2), sequences)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
@pytest.mark.parametrize("seed", [0, 1])
def test_plans_that_cut_anywhere(name: str, seed: int) -> None:
    """Nano-batches that are no whole tiles, different ones for each operation."""
    model = model_for_gpu(**CONFIGS[name])
    weights, sequences = weights_for_gpu(model, 3), random_sequences(seed)
    plan = random_plan(model, DENSE, Random(seed), alike={"moe_down_proj": "moe_gate_up_proj"})
    with gpu_executor(model, weights, plan) as run:
        check_logits(all_logits(run, maker(), sequences, DENSE, seed), sequences, model, weights)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_plans_agree(name: str) -> None:
    """Sequential, in two nano-batches, and on SM partitions: the same numbers but for rounding, of the same batches."""
    model = model_for_gpu(**CONFIGS[name])
    weights, sequences = weights_for_gpu(model, 4), random_sequences(4)
    found = {}
    for kind, plan in plans(model, DENSE).items():
        with gpu_executor(model, weights, plan) as run:
            found[kind] = all_logits(run, maker(), sequences, DENSE, 4)
            check_logits(found[kind], sequences, model, weights)
    for kind in ("nano-batch", "partitioned"):
        for slot in sequences:
            assert relative_error(found[kind][slot], found["sequential"][slot]) <= ERROR / 2


def test_every_step_takes_a_plan_that_can_run_it() -> None:
    """Plans for some numbers of decode tokens, on partitions: steps that only decode, full ones, and prompts alone."""
    full, few = partitioned_plan(MODEL, DENSE), partitioned_plan(MODEL, 8)
    chosen = [
        sequential_plan(MODEL.operations, DENSE),
        dataclasses.replace(full, loads=((4, 29),)),
        dataclasses.replace(few, loads=((8, 30),)),
    ]
    ids = {slot: ids[:length] for (slot, ids), length in zip(random_ids(6).items(), LENGTHS, strict=True)}
    decoding, prompts = list(ids)[:4], list(ids)[4:]
    with gpu_executor(MODEL, WEIGHTS, chosen) as run:
        batches = maker()
        for slot in decoding:
            run.logits(batches.batch([Part(slot, 0, ids[slot][:-2])]), np.zeros(0, np.int32))
        for back in (2, 1):  # beside prompts that fill the dense batch, then alone
            ends = {slot: len(ids[slot]) - back for slot in decoding}
            parts = [Part(slot, end, ids[slot][end : end + 1], decode=True) for slot, end in ends.items()]
            parts += [Part(slot, 0, ids[slot]) for slot in prompts] if back == 2 else []
            batch = batches.batch(parts)
            found = run.logits(batch, batch.qo_indptr[1:] - 1)
            assert (batch.num_tokens > 256) == (back == 2)
            for row, part in zip(found, parts, strict=True):
                seen = ids[part.slot][: part.start + len(part.token_ids)]
                assert relative_error(row[None], last_logits(seen)[None]) <= ERROR


def test_neighbours_do_not_matter_beyond_rounding() -> None:
    sequences = random_sequences(5)
    with gpu_executor(MODEL, WEIGHTS, nano_batch_plan(MODEL.operations, DENSE)) as run:
        together = all_logits(run, maker(), sequences, DENSE, 5)
        for slot, ids in sequences.items():
            alone = all_logits(run, maker(seed=slot), {slot: ids}, DENSE, slot)[slot]
            assert relative_error(together[slot], alone) <= ERROR / 2


def test_a_step_gives_the_same_bits_every_time() -> None:
    sequences = random_sequences(6)
    with gpu_executor(MODEL, WEIGHTS, nano_batch_plan(MODEL.operations, DENSE)) as run:
        first, second = (all_logits(run, maker(), sequences, DENSE, 6) for _ in range(2))
    for slot in sequences:
        np.testing.assert_array_equal(first[slot], second[slot])


# What a step does besides the forward pass.


def pairs(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, np.int32)


def test_sampled_tokens_feed_the_next_steps_before_the_host_knows_them() -> None:
    """More steps at once than any ring of staging memory has places; each token follows from those before it."""
    prompts = {0: PROMPT[:3], 1: PROMPT[3:4], 2: PROMPT[4:14]}
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        handles = [run.submit(batches.batch([Part(slot, 0, ids) for slot, ids in prompts.items()]))]
        for i in range(20):
            parts = [Part(slot, len(ids) + i, [-1], decode=True) for slot, ids in prompts.items()]
            handles.append(run.submit(batches.batch(parts)))
        sampled = np.array([handle.result().token_ids for handle in handles])
    for slot, ids in prompts.items():
        reference = reference_logits(MODEL, WEIGHTS, [*ids, *sampled[:-1, slot].tolist()])[len(ids) - 1 :]
        missed = reference.max(axis=1) - reference[np.arange(len(sampled)), sampled[:, slot]]
        assert (missed <= ERROR * np.linalg.norm(reference, axis=1)).all()


def test_swapped_pages_come_back_elsewhere() -> None:
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        tokens_of(run, batches.batch([Part(0, 0, PROMPT)]))
        old = batches.table(0)[:2].copy()
        tokens_of(run, batches.batch([Part(1, 0, [9])], swap_out=pairs((old[0], 7), (old[1], 2))))
        batches.tables[2] = np.concatenate([old, batches.table(1)[4:]])  # someone else overwrites the pages
        tokens_of(run, batches.batch([Part(2, 0, [1] * 30)]))
        new = np.array([batches.free.pop() for _ in range(8)], np.int32)
        batches.tables[0] = new
        batch = batches.batch([Part(0, 21, [30], decode=True)], swap_in=pairs((7, new[0]), (2, new[1])))
        logits = run.logits(batch, np.array([0], np.int32))
    assert relative_error(logits, last_logits([*PROMPT, 30])[None]) <= ERROR


def test_one_step_may_swap_out_and_in_through_the_same_host_page_and_then_copy() -> None:
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        tokens_of(run, batches.batch([Part(0, 0, PROMPT[:16])]))
        page = int(batches.table(0)[0])
        moved, copied = int(batches.free.pop()), int(batches.free.pop())
        batches.tables[1] = np.array([copied, *batches.table(0)[4:]], np.int32)
        batch = batches.batch(
            [Part(1, 16, [30], decode=True)],
            swap_out=pairs((page, 3)),
            swap_in=pairs((3, moved)),
            page_copies=pairs((moved, copied)),
        )
        logits = run.logits(batch, np.array([0], np.int32))
    assert relative_error(logits, last_logits([*PROMPT[:16], 30])[None]) <= ERROR


def test_siblings_share_full_pages_and_get_their_own_copy_of_the_last() -> None:
    """n = 3: the prompt's last row is sampled three times, then each continuation goes its own way."""
    batches, end = maker(), len(PROMPT)
    columns = {"temperature": 2.0, "seeds": 11, "prompt_lens": end, "repetition_penalty": 1.9}
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        last = [end - 1] * 3
        sampling = sampling_batch(last, [0, 1, 2], [end] * 3, sample_index=[0, 1, 2], **columns)
        first = tokens_of(run, batches.batch([Part(0, 0, PROMPT)], sampling, forks=pairs((0, 1, end), (0, 2, end))))
        alone = [
            tokens_of(run, batches.batch([Part(3, 0, PROMPT)], sampling_batch(last[:1], [3], [end], **own)))
            for own in ({**columns, "sample_index": i} for i in range(3))
        ]
        assert [token for tokens in alone for token in tokens] == first
        assert len(set(first)) > 1
        shared, partly = batches.table(0)[:2]
        for slot in (1, 2):
            batches.tables[slot] = np.array([shared, *(batches.free.pop() for _ in range(3))], np.int32)
        batch = batches.batch(
            [Part(slot, end, [-1], decode=True) for slot in range(3)],
            page_copies=pairs((partly, batches.tables[1][1]), (partly, batches.tables[2][1])),
        )
        logits = run.logits(batch, np.arange(3, dtype=np.int32))
    expected = np.stack([last_logits([*PROMPT, token]) for token in first])
    assert relative_error(logits, expected) <= ERROR


def test_a_siblings_first_token_knows_the_prompt_that_comes_with_the_same_step() -> None:
    batches, end = maker(), len(PROMPT)
    order = np.argsort(-last_logits(PROMPT)).tolist()
    words = [[[*PROMPT[-2:], order[0]]]] * 2  # completed by the likeliest token, if the prompt is in the slot's row
    sampling = sampling_batch([end - 1] * 2, [0, 1], [end] * 2, words=words)
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        found = tokens_of(run, batches.batch([Part(0, 0, PROMPT)], sampling, forks=pairs((0, 1, end))))
    assert order[0] not in found
    assert found[0] == found[1]


SAMPLING = {
    "temperature": [0.0, 0.7, 1.0, 2.0, 1.0, 0.9],
    "top_k": [0, 0, 5, 40, 0, 7],
    "top_p": [1.0, 0.9, 1.0, 0.5, 1.0, 0.8],
    "min_p": [0.0, 0.0, 0.0, 0.05, 0.1, 0.0],
    "presence_penalty": [0.5, 0.0, -1.0, 0.0, 0.0, 0.0],
    "frequency_penalty": [0.25, 0.0, 0.0, 0.0, 1.5, 0.0],
    "repetition_penalty": [1.3, 1.0, 1.0, 0.7, 1.0, 1.0],
    "sample_index": [0, 1, 2, 3, 4, 5],
}
LISTS = {
    "bias": [{}, {5: 4.0, 9: -np.inf}, {}, {}, {1: 100.0, 2: 100.0}, {}],
    "allowed": [[], [], list(range(0, 272, 3)), [], [], [7, 8]],
    "words": [[], [], [[3]], [PROMPT[-3:], [*PROMPT[-1:], 6]], [], []],
}


@pytest.mark.parametrize("lists", [False, True])
def test_tokens_are_those_the_cpu_samples_from_the_same_logits(lists: bool) -> None:
    """Every parameter in company; the logits are the GPU's own, so there is no rounding between the two."""
    batches, end = maker(), len(PROMPT)
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        for seed in range(20):
            columns = {"prompt_lens": [end - 9] * SLOTS, "seeds": np.arange(SLOTS) + 1000 * seed} | SAMPLING
            rows = [end * slot + end - 1 for slot in range(SLOTS)]
            sampling = sampling_batch(rows, list(range(SLOTS)), [end] * SLOTS, **columns, **(LISTS if lists else {}))
            prompts = np.random.default_rng(seed).integers(0, 272, (SLOTS, end))
            prompts[3] = PROMPT
            batch = batches.batch([Part(slot, 0, ids.tolist()) for slot, ids in enumerate(prompts)], sampling)
            found = tokens_of(run, batch)
            logits = run.logits(batch, sampling.rows)
            with np.errstate(divide="ignore"):
                expected = sample(logits, sampling, prompts.astype(np.int32))
            assert found == expected.tolist()


def test_logprobs_are_those_of_the_raw_logits() -> None:
    ids = [*PROMPT, 2, 60, 33]
    sampling = sampling_batch([23, 23], [0, 1], [24, 24], logprobs=[2, -1], temperature=[0, 1.5], bias=[{7: 100.0}, {}])
    asked = PromptLogprobsBatch(*(np.array(a, np.int32) for a in ([0, 1, 4], [0, 0, 0], [17, 3, 21], [4, 4, 4])))
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        batch = batches.batch([Part(0, 0, ids)], sampling, prompt_logprobs=asked)
        result = run.submit(batch).result()
        logits = run.logits(batch, np.arange(24, dtype=np.int32)).astype(np.float64)
        unasked = run.submit(batches.batch([Part(2, 0, ids)])).result()
    assert (unasked.logprobs, unasked.prompt_logprobs) == (None, None)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert result.token_ids[0] == 7  # the bias decides, and is not part of the log-probability
    check_logprobs(result.logprobs, logprobs[[23]], result.token_ids[:1], 2)
    check_logprobs(result.prompt_logprobs, logprobs[[0, 1, 4]], np.array([17, 3, 21]), 4)


def test_prompt_logprobs_of_more_rows_than_logits_fit() -> None:
    ids = random_sequences(7)[0]
    rows = np.arange(len(ids) - 1, dtype=np.int32)
    asked = PromptLogprobsBatch(rows, 0 * rows, np.array(ids[1:], np.int32), rows % 21)
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        batch = batches.batch([Part(0, 0, ids)], prompt_logprobs=asked)
        result = run.submit(batch).result()
        logits = run.logits(batch, rows).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    check_logprobs(result.prompt_logprobs, logprobs, np.array(ids[1:]), rows % 21)


def check_logprobs(found, reference: np.ndarray, chosen: np.ndarray, counts) -> None:
    """Ids and ranks are exact but for ties; of each row as many as were asked for."""
    assert found is not None
    counts = np.broadcast_to(counts, len(reference))
    assert found.top_ids.shape[1] == counts.max()
    for i, (row, count) in enumerate(zip(reference, counts.tolist(), strict=True)):
        by_rank = np.argsort(-row, kind="stable")
        np.testing.assert_allclose(row[found.top_ids[i, :count]], row[by_rank[:count]], atol=1e-5)
        np.testing.assert_allclose(row[by_rank[found.ranks[i] - 1]], row[chosen[i]], atol=1e-5)
        np.testing.assert_allclose(found.top_logprobs[i, :count], row[by_rank[:count]], atol=1e-4)
        np.testing.assert_allclose(found.logprobs[i], row[chosen[i]], atol=1e-4)


# Faults and limits.

POISON = 50


def test_nan_reaches_no_neighbour_and_no_later_owner_of_the_page() -> None:
    """A poisonous token yields −1; others, also on the pages it leaves behind, get what they always get."""
    embed = WEIGHTS.embed.copy()
    embed[POISON] = np.nan
    poisoned = map_weights(WEIGHTS, lambda array: embed if array is WEIGHTS.embed else array)
    prompt = [token for token in PROMPT if token != POISON]
    rows = np.arange(len(prompt), dtype=np.int32)
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        clean = run.logits(batches.batch([Part(0, 0, prompt)]), rows)
    batches = maker()
    with gpu_executor(MODEL, poisoned, nano_batch_plan(MODEL.operations, DENSE)) as run:
        parts = [Part(1, 0, [7, POISON, *[9] * 20]), Part(0, 0, prompt)]
        result = tokens_of(run, batches.batch(parts))
        assert result == [-1, int(clean[-1].argmax())]
        after = tokens_of(run, batches.batch([Part(1, 22, [-1], decode=True)]))  # launched before anyone knew
        assert after == [-1]
        batches.tables[2] = batches.tables[1]
        again = run.logits(batches.batch([Part(2, 0, prompt)]), rows)
    assert relative_error(again, clean) <= ERROR / 2


def test_a_failure_is_delivered_by_its_handle_and_every_later_one() -> None:
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, 16) as run:
        before = run.submit(batches.batch([Part(0, 0, PROMPT[:10])]))
        bad = run.submit(batches.batch([Part(1, 0, PROMPT)]))  # more tokens than the dense batch has
        after = run.submit(batches.batch([Part(2, 0, PROMPT[:10])]))
        assert before.exception() is None
        assert bad.exception() is not None
        assert after.exception() is bad.exception()


def test_close_finishes_what_was_submitted_and_can_be_repeated() -> None:
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        handles = [run.submit(batches.batch([Part(0, 0, PROMPT)])) for _ in range(12)]
        run.close()
        run.close()
        assert not own_threads()
        assert len({int(handle.result().token_ids[0]) for handle in handles}) == 1
        with pytest.raises(EngineError, match="closed"):
            run.submit(batches.batch([Part(0, 0, PROMPT)]))


def test_a_step_may_hold_no_tokens_and_sample_nothing() -> None:
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        assert tokens_of(run, batches.batch([], swap_out=pairs((0, 0)))) == []
        assert tokens_of(run, batches.batch([Part(0, 0, PROMPT[:9])], nothing())) == []
        batch = batches.batch([Part(0, 9, PROMPT[9:])])
        logits = run.logits(batch, np.array([len(PROMPT) - 10], np.int32))
    assert relative_error(logits, last_logits(PROMPT)[None]) <= ERROR


def nothing() -> SamplingBatch:
    return sampling_batch([], [], [])


def test_a_traced_step_tells_of_every_nano_operation_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_trace, "WARM_SECONDS", 0.05)
    plan, sequences = nano_batch_plan(MODEL.operations, DENSE), random_sequences(8)
    batch = maker().batch([Part(slot, 0, (sequences[slot] * MAX_LEN)[:145]) for slot in range(2)])
    with gpu_executor(MODEL, WEIGHTS, plan) as run:
        before = tokens_of(run, batch)
        spans = run.trace(batch)
        assert tokens_of(run, batch) == before
        run.close()
        with pytest.raises(EngineError, match="closed"):
            run.trace(batch)
    steps = unroll(plan, MODEL.operations, MODEL.config.num_layers)
    names = [f"{step.operation.name} [{step.start}, {step.stop}) layer {step.layer}" for step in steps]
    assert [span.name for span in spans] == ["embed and plan", *names, "logits", "sampling"]
    assert {span.stream for span in spans} == {"step", *(stream.name for stream in plan.streams)}
    assert all(span.start_us >= 0 and span.duration_us >= 0 for span in spans)
    assert max(spans, key=lambda span: span.start_us).name == "sampling"


@pytest.mark.alone
def test_a_model_without_kernels_leaves_nothing_behind() -> None:
    model = model_for_gpu(qkv_bias=True, o_bias=True)
    weights, device = weights_for_gpu(model, 0), Device()
    free = device.memory()[0]
    with pytest.raises(ModelError, match=r"^o_bias: "), gpu_executor(model, weights, DENSE):
        pass
    assert device.memory()[0] >= free - (32 << 20)


@pytest.mark.alone
def test_opening_and_closing_leaves_nothing_behind() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def use() -> None:
        with gpu_executor(MODEL, WEIGHTS, nano_batch_plan(MODEL.operations, DENSE)) as run:
            tokens_of(run, maker().batch([Part(0, 0, PROMPT)]))

    use()
    gc.collect()
    device = Device()
    free, files = device.memory()[0], open_files()
    for _ in range(20):
        use()
    gc.collect()
    assert device.memory()[0] >= free - (16 << 20)  # less than a megabyte each: also what was loaded is unloaded
    assert open_files() == files
    assert not own_threads()


def own_threads() -> list[threading.Thread]:
    """The engine's threads that are still there a second after their ends."""
    for thread in threading.enumerate():
        if thread.name.startswith("nf-"):
            thread.join(timeout=1)
    return [thread for thread in threading.enumerate() if thread.name.startswith("nf-")]


@pytest.mark.alone
def test_too_many_pages_say_how_much_memory_there_is() -> None:
    free = Device().memory()[0]
    with (
        pytest.raises(DeviceMemoryError, match=r"KV pages need \d+\.\d\d GiB of GPU memory, and .* are free"),
        gpu_executor(MODEL, WEIGHTS, DENSE, num_pages=1 << 26),
    ):
        pass
    assert Device().memory()[0] >= free - (64 << 20)
