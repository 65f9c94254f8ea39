"""What the GPU executor samples and logs, against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
from executor_cases import Part, sampling_batch
from executor_runs import DENSE, MODEL, PROMPT, WEIGHTS, random_sequences, tokens_of
from gpu_runs import SLOTS, gpu_executor, maker

from nf.executors.cpu_sampling import sample
from nf.scheduler.batch import PromptLogprobsBatch

pytestmark = pytest.mark.gpu


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
