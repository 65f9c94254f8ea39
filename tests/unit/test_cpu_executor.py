"""The CPU executor against a dense float64 model, for any configuration, chunking, page table, plan and order."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from executor_cases import (
    BatchMaker,
    Part,
    all_logits,
    closest_call,
    random_plan,
    random_weights,
    reference_logits,
    small_model,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nf.config import RopeConfig
from nf.executors.cpu import CpuExecutor
from nf.graphs.plan import PipelinePlan, nano_batch_plan, sequential_plan
from nf.models.declaration import Model, ModelWeights

DENSE = 24
SLOTS = 3
MAX_LEN = 200


def executor(
    model: Model, weights: ModelWeights, plan: PipelinePlan, page_size: int = 4, interleave: Random | None = None
) -> CpuExecutor:
    return CpuExecutor(
        model,
        weights,
        plan,
        page_size=page_size,
        num_pages=SLOTS * (MAX_LEN // page_size + 2),
        num_host_pages=8,
        max_num_seqs=SLOTS,
        max_model_len=MAX_LEN,
        interleave=interleave,
    )


def maker(page_size: int = 4, seed: int = 0) -> BatchMaker:
    pages = MAX_LEN // page_size + 2
    return BatchMaker(page_size, SLOTS * pages, pages, np.random.default_rng(seed))


def random_sequences(rng: np.random.Generator, vocab_size: int, longest: int) -> dict[int, list[int]]:
    return {s: rng.integers(0, vocab_size, rng.integers(1, longest + 1)).tolist() for s in range(SLOTS)}


ROPES = [
    RopeConfig(theta=100.0),
    RopeConfig(theta=500.0, kind="linear", factor=4.0),
    RopeConfig(kind="llama3", theta=50.0, factor=8.0, original_max_position_embeddings=64),
]

CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "heads": st.sampled_from([(1, 1), (2, 2), (3, 1), (6, 2), (8, 1), (12, 1), (5, 1)]),
        "head_dim": st.sampled_from([2, 6, 16]),
        "qkv_bias": st.booleans(),
        "o_bias": st.booleans(),
        "qk_norm": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "rope": st.sampled_from(ROPES),
        "sliding_window": st.sampled_from([1, 5, 40]),
        "moe": st.sampled_from([(4, 2), (3, 1), (5, 3)]),
        "num_layers": st.integers(1, 3),
    },
)


def model_of(config: dict) -> Model:
    config = dict(config)
    if "heads" in config:
        config["num_heads"], config["num_kv_heads"] = config.pop("heads")
    if "moe" in config:
        config["architecture"] = "MixtralForCausalLM"
        config["num_experts"], config["experts_per_token"] = config.pop("moe")
    return small_model(**config)


@settings(max_examples=50, deadline=None)
@given(CONFIGS, st.sampled_from(["sequential", "nano-batch", "random"]), st.integers(1, 7), st.integers(0, 2**32))
def test_logits_equal_a_dense_float64_model(config: dict, plan: str, page_size: int, seed: int) -> None:
    model = model_of(config)
    weights = random_weights(model, seed)
    rng = np.random.default_rng(seed)
    plans = {
        "sequential": lambda: sequential_plan(model.operations, DENSE),
        "nano-batch": lambda: nano_batch_plan(model.operations, DENSE),
        "random": lambda: random_plan(model, DENSE, Random(seed)),
    }
    interleave = Random(seed) if seed % 2 else None
    sequences = random_sequences(rng, model.config.vocab_size, 50)
    assume(all(closest_call(model, weights, ids) > 1e-5 for ids in sequences.values()))
    run = executor(model, weights, plans[plan](), page_size, interleave)
    found = all_logits(run, maker(page_size, seed), sequences, DENSE, seed)
    run.close()
    for slot, ids in sequences.items():
        np.testing.assert_allclose(found[slot], reference_logits(model, weights, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("page_size", [1, 16, 300])
def test_long_sequences_span_several_chunks_of_kv(page_size: int) -> None:
    model = small_model(sliding_window=130)
    weights = random_weights(model, 5)
    run = executor(model, weights, sequential_plan(model.operations, DENSE), page_size)
    sequences = random_sequences(np.random.default_rng(5), 61, MAX_LEN) | {0: [i % 61 for i in range(MAX_LEN)]}
    found = all_logits(run, maker(page_size), sequences, DENSE, 5)
    run.close()
    for slot, ids in sequences.items():
        np.testing.assert_allclose(found[slot], reference_logits(model, weights, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"heads": (8, 1), "qk_norm": True},
        {"heads": (3, 1), "moe": (4, 2)},
        {"hidden_size": 96, "intermediate_size": 504, "vocab_size": 1000, "heads": (4, 4), "head_dim": 32},
    ],
)
def test_a_sequence_has_the_same_bits_in_any_company_chunking_plan_and_order(config: dict) -> None:
    model = model_of(config)
    weights = random_weights(model, 1)
    sequences = random_sequences(np.random.default_rng(1), model.config.vocab_size, 180)
    alone = {}
    run = executor(model, weights, sequential_plan(model.operations, DENSE))
    for slot, ids in sequences.items():
        alone |= all_logits(run, maker(seed=slot), {slot: ids}, DENSE, slot)
    run.close()
    for seed in range(4):
        plan = [sequential_plan(model.operations, DENSE), nano_batch_plan(model.operations, DENSE)][seed % 2]
        plan = plan if seed < 3 else random_plan(model, DENSE, Random(seed))
        run = executor(model, weights, plan, interleave=Random(seed))
        together = all_logits(run, maker(seed=seed), sequences, DENSE, seed)
        run.close()
        for slot in sequences:
            np.testing.assert_array_equal(together[slot], alone[slot])


def test_a_large_batch_is_cut_into_groups_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.executors.cpu_attention.GATHER_FLOATS", 1)  # one tile at a time
    model = small_model()
    weights = random_weights(model, 2)
    sequences = random_sequences(np.random.default_rng(2), 61, 60)
    run = executor(model, weights, nano_batch_plan(model.operations, DENSE))
    found = all_logits(run, maker(), sequences, DENSE, 2)
    run.close()
    for slot, ids in sequences.items():
        np.testing.assert_allclose(found[slot], reference_logits(model, weights, ids), rtol=0, atol=1e-4)


def test_weights_of_other_dtypes_are_taken() -> None:
    import ml_dtypes

    model = small_model()
    weights = random_weights(model, 3)
    half = ModelWeights(
        *(a.astype(ml_dtypes.bfloat16) for a in (weights.embed, weights.final_norm, weights.lm_head)),
        tuple({n: a.astype(ml_dtypes.bfloat16) for n, a in layer.items()} for layer in weights.layers),
    )
    run = executor(model, half, sequential_plan(model.operations, DENSE))
    found = all_logits(run, maker(), {0: [3, 1, 4, 1, 5]}, DENSE, 0)[0]
    run.close()
    np.testing.assert_allclose(found, reference_logits(model, half, [3, 1, 4, 1, 5]), rtol=0, atol=1e-4)


def test_sampled_tokens_feed_the_next_steps_before_the_host_knows_them() -> None:
    model = small_model()
    weights = random_weights(model, 4)
    prompts = {0: [1, 2, 3], 1: [9], 2: [7] * 10}
    run = executor(model, weights, nano_batch_plan(model.operations, DENSE))
    batches = maker()
    handles = [run.submit(batches.batch([Part(s, 0, ids) for s, ids in prompts.items()]))]
    for i in range(12):
        handles.append(run.submit(batches.batch([Part(s, len(prompts[s]) + i, [-1], decode=True) for s in prompts])))
    results = [handle.result() for handle in handles]
    run.close()
    for slot, prompt in prompts.items():
        ids = list(prompt)
        for result in results:
            best = int(reference_logits(model, weights, ids)[-1].argmax())
            assert result.token_ids[slot] == best
            ids.append(best)
