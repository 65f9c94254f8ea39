"""The sampling kernels on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from sampling_cases import LENGTH, PromptRows, Result, batch, check_rows, padded, poisoned, shaped
from sampling_first_pass_tests import FirstPassTests
from sampling_tests import PromptLogprobsTests, SamplingTests

from nf.kernels import sampling
from nf.kernels.load import KernelLoader
from nf.kernels.registry import artifacts
from nf.scheduler.batch import SamplingBatch

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def device(values: Any) -> Any:
    """On the device; never empty, so that the pointer is one."""
    if not len(values):
        values = np.zeros(1, values.dtype)
    words = {2: np.int16, 8: np.int64}.get(values.dtype.itemsize)  # what torch does not know, or has another name for
    return torch.from_numpy(values if words is None else values.view(words)).cuda()


class Launch:
    """A launch on poisoned outputs; ``num_samples`` is the device's count of rows."""

    def __init__(self, logits: Any, rows: SamplingBatch, tokens: Any, dtype: str, sms: int) -> None:
        self.wide, self.tokens = device(padded(logits, dtype)), device(tokens)
        total, vocab_size = logits.shape
        self.capacity = total
        self.kernel = sampling.Sampler(
            KernelLoader(artifacts(sampling.sources(), "sm_90a")),
            dtype,
            vocab_size=vocab_size,
            tokens_stride=tokens.shape[1],
            sms=sms,
        )
        self.num_samples = device(np.array([total], np.int32))
        names = [field.name for field in fields(SamplingBatch) if field.name != "rows"]
        self.arrays = {name: device(getattr(rows, name)) for name in names} | {"num_samples": self.num_samples}
        self.workspace = torch.full((self.kernel.workspace_bytes,), 0xFF, device="cuda", dtype=torch.uint8)
        self.workspace[:256] = 0
        self.chosen = device(np.full(total, -7, np.int32))
        self.out = [device(array) for array in poisoned(total)]

    def __call__(self) -> None:
        self.kernel.launch(
            logits=self.wide.data_ptr(), stride=self.wide.shape[1], tokens=self.tokens.data_ptr(),
            arrays=sampling.SamplingArrays(**{name: array.data_ptr() for name, array in self.arrays.items()}),
            token_ids=self.chosen.data_ptr(), workspace=self.workspace.data_ptr(),
            logprobs=sampling.LogprobArrays(*(array.data_ptr() for array in self.out)),
            capacity=self.capacity, stream=torch.cuda.current_stream().cuda_stream, pdl=True,
        )  # fmt: skip

    def result(self) -> Result:
        assert not self.workspace[:256].any()
        return Result(*(array.cpu().numpy() for array in (self.chosen, *self.out, self.tokens)))


class OnGpu:
    def run(self, logits: Any, rows: SamplingBatch, tokens: Any, dtype: str, *, sms: int = 132) -> Result:
        launch = Launch(logits, rows, tokens, dtype, sms)
        launch()
        launch()  # finds the counters as the first one did
        return launch.result()


class TestSampling(OnGpu, SamplingTests):
    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    @pytest.mark.parametrize("kind", ["normal", "peaked", "sorted", "ties", "zipf"])
    @pytest.mark.parametrize("vocab_size", [32001, 128256])
    def test_large_vocabularies(self, dtype: str, kind: str, vocab_size: int) -> None:
        self.test_mixtures(dtype, kind, vocab_size)

    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    @pytest.mark.parametrize(("vocab_size", "length"), [(20000, 8 * LENGTH), (128256, LENGTH)])
    def test_edits_of_large_vocabularies(self, dtype: str, vocab_size: int, length: int) -> None:
        self.test_edits(dtype, vocab_size, length)

    def test_frequencies_follow_the_softmax(self) -> None:
        logits = np.sort(np.random.default_rng(3).normal(0, 1.5, 40))[::-1].astype(np.float32)
        count = 20000
        rows = batch(count, temperature=0.8, top_k=30, slots=0, positions=np.arange(count), prompt_lens=count)
        found = self.run(np.tile(logits, (count, 1)), rows, np.zeros((1, count), np.int32), "fp32").token_ids
        p = np.exp(logits[:30].astype(np.float64) / 0.8)
        expected = count * p / p.sum()
        statistic = ((np.bincount(found, minlength=30) - expected) ** 2 / expected).sum()
        assert abs(statistic - 29) < 5 * np.sqrt(2 * 29)


class TestFirstPass(OnGpu, FirstPassTests):
    pass


class TestPromptLogprobs(PromptLogprobsTests):
    def run_prompt(self, logits: Any, dtype: str, rows: PromptRows, *, sms: int) -> Result:
        wide, out = device(padded(logits, dtype)), [device(array) for array in poisoned(len(rows.targets))]
        count, targets, wanted = (device(array) for array in (rows.count, rows.targets, rows.wanted))
        loader, vocab_size = KernelLoader(artifacts(sampling.sources(), "sm_90a")), logits.shape[1]
        sampling.PromptLogprobs(loader, dtype, vocab_size=vocab_size).launch(
            logits=wide.data_ptr(), stride=wide.shape[1], count=count.data_ptr(), start=rows.start, stop=rows.stop,
            targets=targets.data_ptr(), wanted=wanted.data_ptr(), sms=sms,
            stream=torch.cuda.current_stream().cuda_stream,
            logprobs=sampling.LogprobArrays(*(array.data_ptr() for array in out)),
        )  # fmt: skip
        return Result(None, *(array.cpu().numpy() for array in out), None)


@pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
def test_only_the_rows_there_are(dtype: str) -> None:
    """The count is read from the device, also by a launch that was captured."""
    logits = np.random.default_rng(2).standard_normal((9, 3000)).astype(np.float32)
    rows, tokens = batch(9, temperature=1.0, logprobs=2), np.full((9, LENGTH), -3, np.int32)
    launch = Launch(logits, rows, tokens, dtype, sms=2)
    launch.num_samples.fill_(0)
    torch.cuda.synchronize()  # the count must not be written by the kernel before
    launch()  # loads the kernel, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for count in (0, 1, 5):
        launch.num_samples.fill_(count)
        graph.replay()
        found = launch.result()
        assert (found.token_ids[count:] == -7).all()
        assert (found.token_ids[:count] >= 0).all()
        assert (found.tokens[count:] == -3).all()
        assert (found.ranks[count:] == -7).all()


@pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
@pytest.mark.parametrize("sms", [3, 132])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_every_launch_finds_the_same(sms: int, dtype: str, penalty: float, crowd: Callable[[], None]) -> None:
    """To the last bit, in a crowd and beside its own stores of edited rows: what a warp reads of its ring must have
    arrived before the next copy there is begun."""
    count, vocab_size = 2 * sms, 128256
    logits = shaped(np.random.default_rng(5), "normal", count, vocab_size)
    rows = batch(count, temperature=1.0, repetition_penalty=penalty, logprobs=0)
    launch = Launch(logits, rows, np.zeros((count, LENGTH), np.int32), dtype, sms)
    launch()
    check_rows(launch.result(), logits, rows, dtype, np.zeros((count, LENGTH), np.int32))
    first = [array.clone() for array in (launch.chosen, *launch.out[:2])]
    differing = torch.zeros(3, dtype=torch.int64, device="cuda")
    for _ in range(200):
        crowd()
        launch()
        found = (launch.chosen, *launch.out[:2])
        differing += torch.stack([(a != b).sum() for a, b in zip(found, first, strict=True)])
    assert differing.tolist() == [0, 0, 0]
