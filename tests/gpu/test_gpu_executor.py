"""The GPU executor against a dense float64 model and the CPU's sampler: configurations, plans, pages, faults."""

from __future__ import annotations

import dataclasses
from random import Random

import numpy as np
import pytest
from executor_cases import Part, all_logits, random_plan, reference_logits, sampling_batch
from executor_runs import (
    DENSE,
    ERROR,
    LENGTHS,
    MODEL,
    PROMPT,
    WEIGHTS,
    check_logits,
    last_logits,
    pairs,
    random_ids,
    random_sequences,
    tokens_of,
)
from gpu_runs import gpu_executor, maker, model_for_gpu, partitioned_plan, plans, relative_error, weights_for_gpu

from nf.config import RopeConfig
from nf.graphs.plan import nano_batch_plan, sequential_plan

pytestmark = pytest.mark.gpu


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
