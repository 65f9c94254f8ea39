"""What comes back from the GPU is what the CPU executor would have returned."""

from __future__ import annotations

import weakref

import device_double
import numpy as np
import pytest
from executor_cases import BatchMaker, sampling_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.executors import gpu_outputs
from nf.executors.base import StepResult, TopLogprobs
from nf.executors.cpu_logprobs import top_logprobs
from nf.executors.gpu_outputs import StepOutputs
from nf.kernels.sampling import MAX_LOGPROBS, LogprobArrays
from nf.scheduler.batch import Batch, PromptLogprobsBatch

SEQS, TOKENS = 5, 9


@pytest.fixture
def outputs(monkeypatch):
    device_double.install(monkeypatch, gpu_outputs)
    made = make(vocab_size=300)
    yield made
    made.free()


def make(vocab_size: int) -> StepOutputs:
    return StepOutputs(max_num_seqs=SEQS, dense_batch_size=TOKENS, vocab_size=vocab_size)


def batch_with(logprobs: list[int], prompt_logprobs: list[int]) -> Batch:
    count = len(logprobs)
    prompt = np.zeros((4, len(prompt_logprobs)), np.int32)
    prompt[3] = prompt_logprobs
    sampling = sampling_batch([0] * count, list(range(count)), [1] * count, logprobs=logprobs)
    maker = BatchMaker(page_size=8, num_pages=8, pages_per_slot=1, rng=np.random.default_rng(0))
    return maker.batch([], sampling, prompt_logprobs=PromptLogprobsBatch(*prompt))


class Kernel:
    """Writes what a sampling kernel writes: 20 columns, nothing in rows that did not ask for them."""

    def __init__(self, outputs: StepOutputs, vocab_size: int, seed: int) -> None:
        self.outputs = outputs
        self.vocab_size = vocab_size
        self.rng = np.random.default_rng(seed)

    def step(self, batch: Batch) -> StepResult:
        """Enqueue the writes of a step, and return what the CPU executor would."""
        wanted, prompt = batch.sampling.logprobs, batch.prompt_logprobs.logprobs
        token_ids = self.rng.integers(-1, self.vocab_size, len(wanted)).astype(np.int32)
        tops = [self._report(wanted, np.maximum(token_ids, 0), self.outputs.logprobs)]
        tops.append(self._report(prompt, np.zeros(len(prompt), np.int32), self.outputs.prompt_logprobs))

        def sample() -> None:
            device_double.at(self.outputs.token_ids, token_ids.shape, np.int32)[:] = token_ids

        device_double.enqueue(sample)
        return StepResult(token_ids, *tops)

    def _report(self, wanted: np.ndarray, chosen: np.ndarray, arrays: LogprobArrays) -> TopLogprobs | None:
        if not (wanted >= 0).any():
            return None
        logits = self.rng.standard_normal((len(wanted), self.vocab_size)).astype(np.float32)
        every = top_logprobs(logits, chosen, MAX_LOGPROBS)

        def write() -> None:
            rows = len(wanted)
            logprobs = device_double.at(arrays.logprobs, (rows,), np.float32)
            ranks = device_double.at(arrays.ranks, (rows,), np.int32)
            top_ids = device_double.at(arrays.top_ids, (rows, MAX_LOGPROBS), np.int32)
            top_values = device_double.at(arrays.top_logprobs, (rows, MAX_LOGPROBS), np.float32)
            for row in np.flatnonzero(wanted >= 0):
                count = min(wanted[row], self.vocab_size)
                logprobs[row], ranks[row] = every.logprobs[row], every.ranks[row]
                if not count:
                    continue
                top_ids[row], top_values[row] = -1, -np.inf
                top_ids[row, :count] = every.top_ids[row, :count]
                top_values[row, :count] = every.top_logprobs[row, :count]

        device_double.enqueue(write)
        return top_logprobs(logits, chosen, int(wanted.max()))


def check(found: StepResult, expected: StepResult, batch: Batch) -> None:
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    assert found.token_ids.dtype == np.int32
    check_top(found.logprobs, expected.logprobs, batch.sampling.logprobs)
    check_top(found.prompt_logprobs, expected.prompt_logprobs, batch.prompt_logprobs.logprobs)


def check_top(found: TopLogprobs | None, expected: TopLogprobs | None, wanted: np.ndarray) -> None:
    """Same shapes and types; what a row asked for is what the CPU says, and the rest is nothing."""
    if expected is None:
        assert found is None
        return
    assert found is not None
    for name in ("logprobs", "ranks", "top_ids", "top_logprobs"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        for row, count in enumerate(wanted.tolist()):
            if count >= 0:
                end = count if name.startswith("top") else 1
                np.testing.assert_array_equal(np.atleast_1d(ours[row])[:end], np.atleast_1d(theirs[row])[:end])
    silent, unlisted = wanted < 0, wanted <= 0
    assert (found.logprobs[silent] == -np.inf).all()
    assert (found.ranks[silent] == 0).all()
    assert (found.top_ids[unlisted] == -1).all()
    assert (found.top_logprobs[unlisted] == -np.inf).all()


COUNTS = st.lists(st.integers(-1, MAX_LOGPROBS), max_size=SEQS)


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.tuples(COUNTS, st.lists(st.integers(0, MAX_LOGPROBS), max_size=TOKENS)), min_size=1, max_size=12),
    reads=st.randoms(use_true_random=False),
    vocab_size=st.sampled_from([7, 300]),
)
def test_results_are_those_of_the_cpu(steps, reads, vocab_size):
    """Whoever reads a result late, or never before its memory is used again, gets that step's."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        device_double.install(monkeypatch, gpu_outputs)
        outputs = make(vocab_size)
        kernel, waiting = Kernel(outputs, vocab_size, seed=len(steps)), []
        for logprobs, prompt_logprobs in steps:
            batch = batch_with(logprobs, prompt_logprobs)
            expected = kernel.step(batch)
            waiting.append((outputs.download(batch, 0), expected, batch))
            while waiting and reads.random() < 0.3:
                pending, expected, batch = waiting.pop(reads.randrange(len(waiting)))
                check(pending.result(), expected, batch)
        for pending, expected, batch in waiting:
            check(pending.result(), expected, batch)


def test_token_ids_alone_are_one_short_copy(outputs):
    outputs.download(batch_with([-1, -1, -1], []), 0)
    assert device_double.COPIES == [12]
    device_double.COPIES.clear()
    outputs.download(batch_with([-1, 0, -1], []), 0)
    assert len(device_double.COPIES) == 1
    device_double.COPIES.clear()
    outputs.download(batch_with([-1, -1, 3], [2]), 0)
    assert len(device_double.COPIES) == 2


def test_a_result_outlives_the_memory_it_landed_in(outputs):
    kernel = Kernel(outputs, 300, seed=1)
    batch = batch_with([4, -1, 0], [3, 1])
    expected = kernel.step(batch)
    result = outputs.download(batch, 0).result()
    for _ in range(2 * gpu_outputs.RING):
        kernel.step(batch)
        outputs.download(batch, 0)
    device_double.finish()
    check(result, expected, batch)


def test_whichever_allocation_fails_none_is_left(monkeypatch):
    device_double.install(monkeypatch, gpu_outputs)
    device_double.check_that_failures_leave_nothing(lambda: make(vocab_size=300))


def test_what_is_freed_keeps_no_page_of_the_host(monkeypatch):
    device_double.install(monkeypatch, gpu_outputs)
    outputs = make(vocab_size=300)
    outputs.download(batch_with([1], [2]), 0).result()
    views = [weakref.ref(view) for landing in outputs._ring for view in landing.sampled.values()]
    outputs.free()
    assert all(view() is None for view in views)


def test_a_step_that_samples_nothing(outputs):
    result = outputs.download(batch_with([], []), 0).result()
    assert result.token_ids.shape == (0,)
    assert (result.logprobs, result.prompt_logprobs) == (None, None)
