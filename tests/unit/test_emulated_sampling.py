"""The sampling kernels on a CPU, emulated: what they choose, whatever the order in which their threads take turns."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_kernel import Copies, EmulatedKernel, EmulatedLoader, aligned, pointer
from sampling_cases import LENGTH, PromptRows, Result, batch, padded, poisoned
from sampling_first_pass_tests import FirstPassTests
from sampling_tests import PromptLogprobsTests, SamplingTests

from nf.kernels import sampling
from nf.scheduler.batch import SamplingBatch

Kernels = dict[str, EmulatedKernel]
SEEDS = itertools.count(1)
DTYPES = pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """By name."""
    folder = tmp_path_factory.mktemp("kernels")
    return {source.name: EmulatedKernel(source, folder) for source in sampling.sources()}


class Emulated:
    copies = Copies.BY_CHANCE
    hidden = 0  # logits at the end of the last row that must not be read

    @pytest.fixture(autouse=True)
    def _take(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def run(self, logits: Any, rows: SamplingBatch, tokens: Any, dtype: str, *, sms: int = 132) -> Result:
        count, vocab_size = logits.shape
        wide, tokens = aligned(padded(logits, dtype)), tokens.copy()
        chosen, out = np.full(count, -7, np.int32), poisoned(count)
        arrays: dict[str, Any] = {
            field.name: getattr(rows, field.name) for field in fields(rows) if field.name != "rows"
        }
        arrays = {name: array if len(array) else np.zeros(1, array.dtype) for name, array in arrays.items()}
        arrays["num_samples"] = np.array([count], np.int32)
        readable: list[Any] = [wide.ravel()[: wide.size - self.hidden]]
        loader: Any = EmulatedLoader(self.kernels, readable=readable, seed=next(SEEDS), copies=self.copies)
        sampler = sampling.Sampler(loader, dtype, vocab_size=vocab_size, tokens_stride=tokens.shape[1], sms=sms)
        workspace = aligned(np.full(sampler.workspace_bytes, 0xFF, np.uint8))
        workspace[:256] = 0
        readable.append(workspace)
        for _ in range(2):  # the second finds the counters as the first one did
            sampler.launch(
                logits=pointer(wide), stride=wide.shape[1],
                arrays=sampling.SamplingArrays(**{name: pointer(array) for name, array in arrays.items()}),
                tokens=pointer(tokens), token_ids=pointer(chosen),
                logprobs=sampling.LogprobArrays(*map(pointer, out)), workspace=pointer(workspace),
                capacity=count, stream=0, pdl=True,
            )  # fmt: skip
        assert not workspace[:256].any()
        return Result(chosen, *out, tokens)


class TestSampling(Emulated, SamplingTests):
    @DTYPES
    @pytest.mark.parametrize("copies", [Copies.AT_ONCE, Copies.LATE])
    def test_copies_done_at_once_or_not_before_somebody_waits(self, dtype: str, copies: Copies) -> None:
        self.copies = copies
        self.test_mixtures(dtype, "normal", 5003)
        self.test_edits(dtype, 2000, LENGTH)

    def test_the_emulator_tells_of_reads_beyond_an_array(self) -> None:
        logits, tokens = np.zeros((1, 1000), np.float32), np.zeros((1, LENGTH), np.int32)
        self.run(logits, batch(1), tokens, "fp32")
        self.hidden = 100
        with pytest.raises(AssertionError, match="a read beyond the arrays"):
            self.run(logits, batch(1), tokens, "fp32")


class TestFirstPass(Emulated, FirstPassTests):
    pass


class TestPromptLogprobs(Emulated, PromptLogprobsTests):
    def run_prompt(self, logits: Any, dtype: str, rows: PromptRows, *, sms: int) -> Result:
        wide, out = aligned(padded(logits, dtype)), poisoned(len(rows.targets))
        loader: Any = EmulatedLoader(self.kernels, readable=[wide], seed=next(SEEDS), copies=self.copies)
        sampling.PromptLogprobs(loader, dtype, vocab_size=logits.shape[1]).launch(
            logits=pointer(wide), stride=wide.shape[1], count=pointer(rows.count), start=rows.start, stop=rows.stop,
            targets=pointer(rows.targets), wanted=pointer(rows.wanted),
            logprobs=sampling.LogprobArrays(*map(pointer, out)), sms=sms, stream=0,
        )  # fmt: skip
        return Result(None, *out, None)

    def test_a_copy_that_may_overtake_reads_is_found(self, tmp_path: Path) -> None:
        source = sampling.prompt_logprobs_source("bf16")
        self.kernels = {source.name: EmulatedKernel(source, tmp_path, without="async_proxy_fence();")}
        logits = np.zeros((1, 40000), np.float32)  # more than the rings hold
        one = np.ones(1, np.int32)
        with pytest.raises(AssertionError, match="may overtake a read"):
            self.run_prompt(logits, "bf16", PromptRows(one, 0, 1, one, one), sms=1)
