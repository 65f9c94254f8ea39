"""Tests of sampling, on a GPU and emulated: a token that is chosen must be kept by the filters and win the draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pytest
from sampling_cases import INF, LENGTH, NAN, PromptRows, Result, batch, check_logprobs, check_rows, seen, shaped

from nf.kernels import sampling
from nf.scheduler.batch import SamplingBatch


class Sampled(ABC):
    """A place where rows are sampled."""

    @abstractmethod
    def run(self, logits: Any, rows: SamplingBatch, tokens: Any, dtype: str, *, sms: int = 132) -> Result:
        """What the second of two launches on the same arrays wrote; ``tokens`` is left alone."""

    def check(self, logits: Any, rows: SamplingBatch, dtype: str, *, tokens: Any = None, sms: int = 132) -> Result:
        if tokens is None:
            tokens = np.zeros((len(logits), LENGTH), np.int32)
        found = self.run(logits, rows, tokens, dtype, sms=sms)
        check_rows(found, logits, rows, dtype, tokens)
        return found


class SamplingTests(Sampled):
    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    @pytest.mark.parametrize("kind", ["normal", "peaked", "sorted", "ties", "zipf"])
    @pytest.mark.parametrize("vocab_size", [1, 5, 1000, 9001])
    def test_mixtures(self, dtype: str, kind: str, vocab_size: int) -> None:
        rng = np.random.default_rng(vocab_size)
        count = 24
        positions = rng.integers(3, LENGTH, count)
        rows = batch(
            count,
            positions=positions,
            prompt_lens=positions // 2,
            temperature=rng.choice([0, 0.05, 0.7, 1, 1, 2], count),
            top_k=rng.choice([0, 0, 1, 20, 50, 1500, 5000, vocab_size], count),
            top_p=rng.choice([1, 0.95, 0.9, 0.5, 0.999, 0.01], count),
            min_p=rng.choice([0, 0, 0, 0.02, 0.5], count),
            sample_index=rng.integers(0, 9, count),
            seeds=rng.integers(0, 2**64, count, dtype=np.uint64),
            logprobs=rng.choice([-1, 0, 1, 5, 20], count),
        )
        self.check(shaped(rng, kind, count, vocab_size), rows, dtype)

    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    @pytest.mark.parametrize(("vocab_size", "length"), [(50, LENGTH), (5000, 8 * LENGTH)])
    def test_edits(self, dtype: str, vocab_size: int, length: int) -> None:
        rng = np.random.default_rng(vocab_size + 1)
        count = 30
        positions = rng.integers(3, length, count)
        tokens = rng.integers(0, vocab_size, (count, length)).astype(np.int32)
        tokens[:, ::2] %= 7  # some tokens occur often
        ids = [rng.permutation(vocab_size)[:8].tolist() for _ in range(count)]
        words = [[[*tokens[i, p - k : p].tolist(), ids[i][k]] for k in (0, 1, 3)] for i, p in enumerate(positions)]
        rows = batch(
            count,
            positions=positions,
            prompt_lens=positions // 3,
            temperature=rng.choice([0, 1, 1.5], count),
            top_k=rng.choice([0, 40], count),
            top_p=rng.choice([1, 0.9], count),
            presence_penalty=rng.choice([0, 0, 1.5, -2], count),
            frequency_penalty=rng.choice([0, 0, 0.5], count),
            repetition_penalty=rng.choice([1, 1, 1.3, 0.6], count),
            logprobs=rng.choice([-1, 0, 3], count),
            bias=[
                dict(zip(own, (-INF, 100, 3, -2, -1, 0, 1, 2), strict=True)) if i % 3 == 0 else {}
                for i, own in enumerate(ids)
            ],
            allowed=[own[2:] if i % 4 == 1 else [] for i, own in enumerate(ids)],
            words=[own if i % 5 < 2 else [] for i, own in enumerate(words)],
        )
        self.check(shaped(rng, "normal", count, vocab_size), rows, dtype, tokens=tokens, sms=3)

    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_rows_without_a_choice(self, dtype: str, temperature: float) -> None:
        logits = np.random.default_rng(1).standard_normal((9, 5000)).astype(np.float32)
        logits[1, 4000], logits[3, 17], logits[5], logits[7, 3] = NAN, INF, -INF, -INF
        logits[8, ::2] = INF  # more than the list of candidates holds
        allowed = [[]] * 6 + [[9], [], []]
        words = [[]] * 6 + [[[9]], [], []]
        rows = batch(9, temperature=temperature, top_p=0.9, allowed=allowed, words=words, logprobs=[5] * 7 + [-1, 5])
        found = self.check(logits, rows, dtype)
        assert (found.token_ids[[1, 3, 5, 6, 8]] == -1).all()
        assert (found.token_ids[[0, 2, 4, 7]] >= 0).all()

    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    @pytest.mark.parametrize("vocab_size", [4096, 10000])
    def test_rows_of_nan(self, dtype: str, vocab_size: int) -> None:
        """All of a row counts as −∞: more ties than the list of candidates holds, and the lowest ids are listed."""
        logits = np.random.default_rng(4).standard_normal((6, vocab_size)).astype(np.float32)
        logits[:4] = NAN
        rows = batch(6, temperature=[0, 1, 0, 1, 0, 1], top_p=[1, 0.9, 1, 1, 1, 1], logprobs=[5, 5, 0, -1, 5, 5])
        found = self.check(logits, rows, dtype)
        assert (found.token_ids[:4] == -1).all()
        assert (found.token_ids[4:] >= 0).all()
        assert (found.top_ids[:2, :5] == np.arange(5)).all()

    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    @pytest.mark.parametrize("vocab_size", [5000, 10000])
    def test_fewer_numbers_than_asked_for(self, dtype: str, vocab_size: int) -> None:
        """Top-k and log-probabilities reach beyond what is finite, to ties at −∞; odd rows have NaN in between."""
        rng, count = np.random.default_rng(vocab_size), 16
        logits = np.full((count, vocab_size), -INF, np.float32)
        logits[1::4, ::3] = NAN
        logits[3::4, :2600] = NAN  # more than the list of candidates holds
        for row in logits:
            row[rng.permutation(vocab_size)[:7]] = rng.normal(0, 3, 7)
        rows = batch(
            count,
            temperature=[0, 0, 1, 1] * 4,
            top_k=[8, 8, 8, 8, 50, 50, 50, 50, 3000, 3000, 3000, 3000, 0, 0, 0, 0],
            top_p=[1, 1, 1, 1, 0.7, 0.7, 0.7, 0.7] * 2,
            logprobs=[20, 20, 20, 20, 3, 3, 9, 9, 0, 0, 0, 0, 12, 12, 12, 12],
        )
        found = self.check(logits, rows, dtype)
        assert (found.token_ids[1::2] == -1).all()
        assert (found.token_ids[::2] >= 0).all()

    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    def test_equal_logits_everywhere(self, dtype: str) -> None:
        """More ties than the list of candidates holds: the lowest ids are kept."""
        logits = np.full((6, 50000), 1.5, np.float32)
        logits[:, 3] = -INF
        rows = batch(
            6,
            temperature=[0, 1, 1, 1, 1, 1],
            top_k=[0, 1, 10, 5000, 5000, 0],
            top_p=[1, 1, 1, 1, 0.5, 0.25],
            logprobs=20,
        )
        found = self.check(logits, rows, dtype)
        assert (found.token_ids <= [0, 0, 10, 5000, 2500, 12500]).all()


class PromptLogprobsTests(ABC):
    @abstractmethod
    def run_prompt(self, logits: Any, dtype: str, rows: PromptRows, *, sms: int) -> Result:
        """What a launch wrote."""

    @pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)
    @pytest.mark.parametrize(("count", "start", "stop"), [(0, 0, 7), (1, 0, 1), (40, 10, 33), (20, 10, 33)])
    def test_prompt_logprobs(self, dtype: str, count: int, start: int, stop: int) -> None:
        rng, vocab_size = np.random.default_rng(count), 20001
        logits = shaped(rng, "peaked", stop - start, vocab_size)
        logits[0, 5] = NAN
        logits[1:2, ::8] = INF  # more than the list of candidates holds
        targets, wanted = rng.integers(0, vocab_size, 50).astype(np.int32), rng.choice([0, 1, 20], 50).astype(np.int32)
        rows = PromptRows(np.array([count], np.int32), start, stop, targets, wanted)
        found = self.run_prompt(logits, dtype, rows, sms=4)
        x = seen(logits, dtype)
        for i in range(start, min(stop, count)):
            check_logprobs(x[i - start], int(targets[i]), int(wanted[i]), found, i)
        assert (found.ranks[min(stop, max(count, start)) :] == -7).all()
        assert (found.ranks[:start] == -7).all()
