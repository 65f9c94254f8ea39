"""Tests, on a GPU and emulated, of rows that are drawn from in their first pass (kernels/draw_first.cuh): what that has
to notice, and to leave to others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sampling_cases import INF, LENGTH, NAN, batch, seen
from sampling_tests import Sampled

from nf.executors.cpu_sampling import sample
from nf.executors.philox import noise_of_all
from nf.kernels import sampling

VOCAB = 20000
COUNT = 48
DTYPES = pytest.mark.parametrize("dtype", sampling.LOGITS_TYPES)


def looked_at(vocab_size: int, dtype: str) -> Any:
    """Ids that the kernel guesses a row by (read_sample of first_pass.cuh), ascending."""
    width = 8 if dtype == "bf16" else 4
    stride = max(1, -(-vocab_size // width) // 512)
    ids = (np.arange(512)[:, None] * stride * width + np.arange(width)).ravel()
    return ids[ids < vocab_size]


def normal(count: int = COUNT, vocab_size: int = VOCAB) -> Any:
    return np.random.default_rng(vocab_size).standard_normal((count, vocab_size)).astype(np.float32)


class FirstPassTests(Sampled):
    @DTYPES
    def test_no_token_from_beyond_the_row(self, dtype: str) -> None:
        """A vector ends beyond the vocabulary, where infinities lie: whatever noise is drawn there does not count."""
        seeds, vocab_size, lanes = np.arange(60000, dtype=np.uint64), 5, 256
        none = np.zeros(len(seeds), np.int32)
        beyond = noise_of_all(seeds, none + 5, none, lanes)[:, vocab_size:]
        seeds = seeds[beyond.max(axis=1) > 14]  # they would win, by far
        assert len(seeds) > 5
        logits = np.tile(np.array([0.5, -0.25, 0.125, 1, -1], np.float32), (len(seeds), 1))
        self.check(logits, batch(len(seeds), temperature=1.0, seeds=seeds), dtype)

    @DTYPES
    @pytest.mark.parametrize("top_p", [0.75, 0.9])
    def test_share_that_ends_among_equal_logits(self, dtype: str, top_p: float) -> None:
        """The winner's like are many: what is above it tells no more than that it may be kept."""
        logits = np.zeros((COUNT, VOCAB), np.float32)
        logits[:, ::3] = 0.6875
        self.check(logits, batch(COUNT, temperature=1.0, top_p=top_p), dtype)

    @DTYPES
    @pytest.mark.parametrize("top_p", [0.75, 0.9])
    def test_share_that_ends_above_the_guess(self, dtype: str, top_p: float) -> None:
        logits = normal()
        logits[:, looked_at(VOCAB, dtype)] = -3
        self.check(logits, batch(COUNT, temperature=1.0, top_p=top_p), dtype)

    @DTYPES
    def test_weight_that_was_hardly_looked_at(self, dtype: str) -> None:
        """Nearly all of it is in the sample, or in one token beside: the first bar is often higher than the winner."""
        count, vocab_size = 100, 128256
        logits = np.full((count, vocab_size), -40, np.float32)
        sampled = looked_at(vocab_size, dtype)
        logits[:, sampled] = np.log(1.7 / len(sampled))
        logits[:, 0] = 0
        self.check(logits, batch(count, temperature=1.0), dtype)

    @DTYPES
    @pytest.mark.parametrize("top_p", [1.0, 0.9])
    def test_more_than_can_be_listed(self, dtype: str, top_p: float) -> None:
        logits = np.full((COUNT, VOCAB), -0.01, np.float32)
        sampled = looked_at(VOCAB, dtype)
        logits[:, sampled] = -INF
        if top_p < 1:
            logits[:, sampled[::50]] = 0
        self.check(logits, batch(COUNT, temperature=1.0, top_p=top_p), dtype)

    @DTYPES
    @pytest.mark.parametrize("top_p", [1.0, 0.9])
    @pytest.mark.parametrize("temperature", [1e-3, 1.0])
    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_logits_far_from_zero(self, dtype: str, top_p: float, temperature: float, offset: float) -> None:
        logits = normal(8) * np.float32(200) + np.float32(offset)  # bf16 has steps of 64 there
        self.check(logits, batch(8, temperature=temperature, top_p=top_p), dtype)

    @DTYPES
    @pytest.mark.parametrize("top_p", [1.0, 0.9])
    def test_rows_without_a_choice_in_the_first_pass(self, dtype: str, top_p: float) -> None:
        logits = normal(8)
        sampled, other = int(looked_at(VOCAB, dtype)[9]), 4 * 8 * (VOCAB // 64) + 13
        logits[0, sampled], logits[1, other] = NAN, NAN
        logits[2, sampled], logits[3, other] = INF, INF
        logits[4], logits[5, sampled], logits[6, other] = -INF, -INF, -INF
        found = self.check(logits, batch(8, temperature=1.0, top_p=top_p), dtype)
        assert (found.token_ids[:5] == -1).all()
        assert (found.token_ids[5:] >= 0).all()

    @DTYPES
    def test_rows_of_every_kind_one_after_the_other(self, dtype: str) -> None:
        """Two CTAs take them all: nothing of a row may reach the next."""
        count = 60
        logits = normal(count)
        sampled = looked_at(VOCAB, dtype)
        logits[1::6, sampled] = -3
        logits[2::6, :] = -0.01
        logits[2::6, sampled] = -INF
        rows = batch(
            count,
            temperature=[1, 1, 1, 0, 1, 1] * 10,
            top_p=[0.9, 0.75, 1, 1, 1, 0.9] * 10,
            top_k=[0, 0, 0, 0, 40, 0] * 10,
            presence_penalty=[0, 0, 0, 0, 0, 1.5] * 10,
            logprobs=[-1, 0, -1, 3, -1, 0] * 10,
        )
        tokens = np.random.default_rng(1).integers(0, VOCAB, (count, LENGTH)).astype(np.int32)
        self.check(logits, rows, dtype, tokens=tokens, sms=1)

    @DTYPES
    @pytest.mark.parametrize("deviation", [0.5, 2.0])
    @pytest.mark.parametrize("top_p", [0.7, 0.95])
    def test_shares_of_flat_rows(self, dtype: str, deviation: float, top_p: float) -> None:
        """Some rows have a winner beyond what top-p keeps, and a few a second one."""
        count, vocab_size = 100, 9001
        logits = normal(count, vocab_size) * np.float32(deviation)
        rows = batch(count, temperature=1.0, top_p=top_p)
        found = self.check(logits, rows, dtype)
        free = sample(seen(logits, dtype), batch(count, temperature=1.0), np.zeros((count, 8), np.int32))
        assert np.count_nonzero(found.token_ids != free) >= count * (1 - top_p) / 2

    @DTYPES
    def test_many_winners_beyond_the_share(self, dtype: str) -> None:
        """With so many that it takes more than one pass to find one that is kept."""
        count, vocab_size, top_p = 20000, 2000, 0.7
        logits = normal(1, vocab_size) * np.float32(0.5)
        x = -np.sort(-seen(logits, dtype)[0].astype(np.float64))
        weight = np.exp(x)
        kept = 1 + np.count_nonzero(weight.cumsum() < top_p * weight.sum())
        seeds, none = np.arange(count, dtype=np.uint64), np.zeros(count, np.int32)
        order = np.argsort(-seen(logits, dtype)[0], kind="stable")
        scores = x + noise_of_all(seeds, none + 5, none, vocab_size)[:, order]
        best = np.maximum.accumulate(scores, axis=1)
        # Winners, each of those before the last, beyond what is kept.
        beyond = np.count_nonzero(best[:, kept:] > best[:, kept - 1 : -1], axis=1)
        seeds = np.concatenate([seeds[beyond >= 4], seeds[beyond == 3][:30]])
        assert np.count_nonzero(beyond >= 4) >= 5
        rows = batch(len(seeds), temperature=1.0, top_p=top_p, seeds=seeds)
        self.check(np.tile(logits, (len(seeds), 1)), rows, dtype)
