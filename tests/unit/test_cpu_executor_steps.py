"""What a step does besides the forward pass: pages, forks, log-probabilities, faults, closing."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from executor_cases import (
    BatchMaker,
    Part,
    random_weights,
    reference_logits,
    sampling_batch,
    small_model,
)

from nf.errors import EngineError, ModelError, PlanError
from nf.executors.cpu import CpuExecutor
from nf.graphs.plan import PipelinePlan, nano_batch_plan, sequential_plan
from nf.models.declaration import Model, ModelWeights
from nf.models.operations import Operation, Resource
from nf.scheduler.batch import PromptLogprobsBatch

PAGE = 4
MODEL = small_model()
WEIGHTS = random_weights(MODEL, 0)
PROMPT = [5, 17, 3, 44, 8, 21]


def make(model: Model = MODEL, weights: ModelWeights = WEIGHTS, plan: PipelinePlan | None = None) -> CpuExecutor:
    return CpuExecutor(
        model,
        weights,
        plan or sequential_plan(model.operations, 32),
        page_size=PAGE,
        num_pages=64,
        num_host_pages=16,
        max_num_seqs=6,
        max_model_len=40,
    )


def maker(num_pages: int = 64) -> BatchMaker:
    return BatchMaker(PAGE, num_pages, 8, np.random.default_rng(0))


def pairs(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, np.int32)


def last_logits(ids: list[int], weights: ModelWeights = WEIGHTS) -> np.ndarray:
    return reference_logits(MODEL, weights, ids)[-1]


def test_swapped_pages_come_back_elsewhere() -> None:
    run, batches = make(), maker()
    run.submit(batches.batch([Part(0, 0, PROMPT)])).result()
    old = batches.table(0)[:2].copy()
    run.submit(batches.batch([Part(1, 0, [9])], swap_out=pairs((old[0], 7), (old[1], 2)))).result()
    # Someone else overwrites the pages meanwhile.
    batches.tables[2] = np.concatenate([old, batches.table(1)[4:]])
    run.submit(batches.batch([Part(2, 0, [1] * 8)])).result()
    new = np.array([batches.free.pop() for _ in range(8)], np.int32)
    batches.tables[0] = new
    batch = batches.batch([Part(0, 6, [30], decode=True)], swap_in=pairs((7, new[0]), (2, new[1])))
    logits = run.logits(batch, np.array([0], np.int32))
    run.close()
    np.testing.assert_allclose(logits[0], last_logits([*PROMPT, 30]), atol=1e-4)


def test_one_step_may_swap_out_and_in_through_the_same_host_page_and_then_copy() -> None:
    run, batches = make(), maker()
    run.submit(batches.batch([Part(0, 0, PROMPT[:4])])).result()
    page = int(batches.table(0)[0])
    moved, copied = int(batches.free.pop()), int(batches.free.pop())
    batches.tables[1] = np.array([copied, *batches.table(0)[4:]], np.int32)
    batch = batches.batch(
        [Part(1, 4, [30], decode=True)],
        swap_out=pairs((page, 3)),
        swap_in=pairs((3, moved)),
        page_copies=pairs((moved, copied)),
    )
    logits = run.logits(batch, np.array([0], np.int32))
    run.close()
    np.testing.assert_allclose(logits[0], last_logits([*PROMPT[:4], 30]), atol=1e-4)


def test_siblings_share_full_pages_and_get_their_own_copy_of_the_last() -> None:
    """n = 3: the prompt's last row is sampled three times, then each continuation goes its own way."""
    run, batches = make(), maker()
    columns = {"temperature": 2.0, "seeds": 11, "prompt_lens": 6, "repetition_penalty": 1.9}
    first = run.submit(
        batches.batch(
            [Part(0, 0, PROMPT)],
            sampling_batch([5, 5, 5], [0, 1, 2], [6, 6, 6], sample_index=[0, 1, 2], **columns),
            forks=pairs((0, 1, 6), (0, 2, 6)),
        )
    ).result()
    alone = [
        run.submit(
            batches.batch([Part(3, 0, PROMPT)], sampling_batch([5], [3], [6], sample_index=i, **columns))
        ).result()
        for i in range(3)
    ]
    assert [int(a.token_ids[0]) for a in alone] == first.token_ids.tolist()
    assert len(set(first.token_ids.tolist())) > 1

    shared, partly = batches.table(0)[:2]
    for slot in (1, 2):
        batches.tables[slot] = np.array([shared, *(batches.free.pop() for _ in range(3))], np.int32)
    batch = batches.batch(
        [Part(slot, 6, [-1], decode=True) for slot in range(3)],
        page_copies=pairs((partly, batches.tables[1][1]), (partly, batches.tables[2][1])),
    )
    logits = run.logits(batch, np.arange(3, dtype=np.int32))
    run.close()
    for row, token in enumerate(first.token_ids.tolist()):
        np.testing.assert_allclose(logits[row], last_logits([*PROMPT, token]), atol=1e-4)


def test_a_siblings_first_token_knows_the_prompt_that_comes_with_the_same_step() -> None:
    run, batches = make(), maker()
    order = np.argsort(-last_logits(PROMPT)).tolist()
    words = [[[*PROMPT[-2:], order[0]]]] * 2  # completed by the likeliest token, if the prompt is in the slot's row
    sampling = sampling_batch([5, 5], [0, 1], [6, 6], words=words)
    result = run.submit(batches.batch([Part(0, 0, PROMPT)], sampling, forks=pairs((0, 1, 6)))).result()
    run.close()
    assert result.token_ids.tolist() == [order[1], order[1]]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    run, batches = make(), maker()
    ids = [*PROMPT, 2, 60, 33]
    sampling = sampling_batch([8, 8], [0, 1], [9, 9], logprobs=[2, -1], temperature=[0, 1.5], bias=[{7: 100.0}, {}])
    asked = PromptLogprobsBatch(*(np.array(a, np.int32) for a in ([0, 1, 4], [0, 0, 0], [17, 3, 21], [4, 4, 4])))
    result = run.submit(batches.batch([Part(0, 0, ids)], sampling, prompt_logprobs=asked)).result()
    unasked = run.submit(batches.batch([Part(2, 0, ids)])).result()
    run.close()
    assert unasked.logprobs is None
    assert unasked.prompt_logprobs is None
    reference = reference_logits(MODEL, WEIGHTS, ids)
    reference -= np.log(np.exp(reference).sum(-1, keepdims=True))
    assert result.token_ids[0] == 7  # the bias decides, and is not part of the log-probability
    assert result.logprobs is not None
    check_logprobs(result.logprobs, reference[[8, 8]], result.token_ids, 2)
    assert result.prompt_logprobs is not None
    check_logprobs(result.prompt_logprobs, reference[[0, 1, 4]], np.array([17, 3, 21]), 4)


def test_prompt_logprobs_are_worked_out_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.executors.cpu.LOGITS_FLOATS", 1)
    run, batches = make(), maker()
    ids = np.random.default_rng(0).integers(0, 61, 30).tolist()
    rows = np.arange(29, dtype=np.int32)
    asked = PromptLogprobsBatch(rows, 0 * rows, np.array(ids[1:], np.int32), 0 * rows + 3)
    result = run.submit(batches.batch([Part(0, 0, ids)], prompt_logprobs=asked)).result()
    run.close()
    reference = reference_logits(MODEL, WEIGHTS, ids)[:-1]
    reference -= np.log(np.exp(reference).sum(-1, keepdims=True))
    assert result.prompt_logprobs is not None
    check_logprobs(result.prompt_logprobs, reference, np.array(ids[1:]), 3)


def check_logprobs(found, reference: np.ndarray, chosen: np.ndarray, count: int) -> None:
    assert found.top_ids.shape == (len(reference), count)
    for i, row in enumerate(reference):
        by_rank = np.argsort(-row)
        assert found.top_ids[i].tolist() == by_rank[:count].tolist()
        assert by_rank[found.ranks[i] - 1] == chosen[i]
        np.testing.assert_allclose(found.top_logprobs[i], row[by_rank[:count]], atol=1e-4)
        np.testing.assert_allclose(found.logprobs[i], row[chosen[i]], atol=1e-4)


POISON = 50


def poisoned_weights() -> ModelWeights:
    embed = WEIGHTS.embed.copy()
    embed[POISON] = np.nan
    return ModelWeights(embed, WEIGHTS.final_norm, WEIGHTS.lm_head, WEIGHTS.layers)


def test_nan_reaches_no_neighbour_and_no_later_owner_of_the_page() -> None:
    """A poisonous token yields −1; others, also on the pages it leaves behind, get the bits they always get."""
    prompt = [1, 2, 3, 4, 5, 6]
    run, batches = make(), maker()
    clean = run.logits(batches.batch([Part(0, 0, prompt)]), np.arange(6, dtype=np.int32))
    run.close()
    run, batches = make(weights=poisoned_weights(), plan=nano_batch_plan(MODEL.operations, 32)), maker()
    result = run.submit(batches.batch([Part(1, 0, [7, POISON, 9, 9, 9, 9, 9]), Part(0, 0, prompt)])).result()
    assert result.token_ids.tolist() == [-1, int(clean[5].argmax())]
    after = run.submit(batches.batch([Part(1, 7, [-1], decode=True)])).result()  # launched before anyone knew
    assert after.token_ids.tolist() == [-1]
    batches.tables[2] = batches.tables[1]
    again = run.logits(batches.batch([Part(2, 0, prompt)]), np.arange(6, dtype=np.int32))
    run.close()
    np.testing.assert_array_equal(again, clean)


def test_a_value_that_overflows_alone_still_poisons_its_own_request() -> None:
    layers = tuple({name: array.copy() for name, array in layer.items()} for layer in WEIGHTS.layers)
    layers[0]["qkv_proj"][-16:] *= np.float32(3e38)  # rows of V
    run, batches = make(weights=ModelWeights(WEIGHTS.embed, WEIGHTS.final_norm, WEIGHTS.lm_head, layers)), maker()
    assert run.submit(batches.batch([Part(0, 0, PROMPT)])).result().token_ids.tolist() == [-1]
    run.close()


def test_a_failure_is_delivered_by_its_handle_and_every_later_one() -> None:
    run, batches = make(), maker()
    before = run.submit(batches.batch([Part(0, 0, PROMPT)]))
    bad = run.submit(batches.batch([Part(1, 0, [10**6])]))  # no such row of the embedding
    after = run.submit(batches.batch([Part(2, 0, PROMPT)]))
    assert before.result().token_ids.tolist() == [int(last_logits(PROMPT).argmax())]
    failure = bad.exception()
    assert isinstance(failure, IndexError)
    assert after.exception() is failure
    with pytest.raises(IndexError):
        run.logits(batches.batch([Part(3, 0, PROMPT)]), np.array([0], np.int32))
    run.close()


def test_an_order_that_breaks_a_dependency_is_a_failure_that_says_so() -> None:
    run, batches = make(), maker()
    run._steps = run._steps[1:2] + run._steps[:1] + run._steps[2:]
    with pytest.raises(PlanError, match=r"qkv_proj of layer 0 reads row 0 of normed, .* holds nothing yet"):
        run.submit(batches.batch([Part(0, 0, PROMPT)])).result()
    run.close()


def test_close_finishes_what_was_submitted_and_can_be_repeated() -> None:
    threads = threading.active_count()
    run, batches = make(), maker()
    handles = [run.submit(batches.batch([Part(0, 0, PROMPT)])) for _ in range(4)]
    run.close()
    run.close()
    assert threading.active_count() == threads
    assert {handle.result().token_ids[0] for handle in handles} == {last_logits(PROMPT).argmax()}
    with pytest.raises(EngineError, match="closed"):
        run.submit(batches.batch([Part(0, 0, PROMPT)]))


def test_a_step_may_hold_no_tokens() -> None:
    run, batches = make(), maker()
    result = run.submit(batches.batch([], swap_out=pairs((0, 0)))).result()
    run.close()
    assert result.token_ids.tolist() == []


def test_a_step_may_sample_nothing() -> None:
    run, batches = make(), maker()
    assert run.submit(batches.batch([Part(0, 0, PROMPT[:3])], sampling_batch([], [], []))).result().token_ids.size == 0
    batch = batches.batch([Part(0, 3, PROMPT[3:])])
    assert run.submit(batch).result().token_ids.tolist() == [int(last_logits(PROMPT).argmax())]
    run.close()


def test_plan_and_operations_are_checked_before_anything_is_allocated() -> None:
    with pytest.raises(PlanError):
        make(plan=sequential_plan(MODEL.operations[:-1], 32))
    unknown = Operation("all_reduce", Resource.NETWORK, ("hidden",), ("hidden",))
    model = Model(
        MODEL.config, (*MODEL.operations, unknown), MODEL.layer_weights, MODEL.embed, MODEL.final_norm, MODEL.lm_head
    )
    with pytest.raises(ModelError, match="all_reduce"):
        make(model, plan=sequential_plan(model.operations, 32))
