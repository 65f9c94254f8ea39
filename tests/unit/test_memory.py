"""Predicted peak memory against a simulation that appends one token after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.scheduler.memory import PRIOR_OUTPUT_LEN, OutputLength, longest_prefix, predict_peak
from nf.scheduler.pages import pages_for

sequences = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), max_size=12)


def simulate_peak(tokens: list[int], remaining: list[int], page_size: int) -> int:
    """Most pages in use at once, step by step."""
    peak = 0
    for step in range(max(remaining, default=0) + 1):
        peak = max(
            peak, sum(pages_for(t + step, page_size) for t, r in zip(tokens, remaining, strict=True) if r >= step)
        )
    return peak


@settings(max_examples=200, deadline=None)
@given(seqs=sequences, page_size=st.sampled_from([1, 2, 7, 16]))
def test_peak_is_the_simulated_one_but_for_half_filled_pages(seqs: list[tuple[int, int]], page_size: int) -> None:
    tokens, remaining = [t for t, _ in seqs], [r for _, r in seqs]
    predicted = predict_peak(np.array(tokens, np.int64), np.array(remaining, np.int64), page_size)
    exact = simulate_peak(tokens, remaining, page_size)
    assert exact <= predicted <= exact + len(seqs)
    if page_size == 1:
        assert predicted == exact


@settings(max_examples=100, deadline=None)
@given(running=sequences, candidates=st.lists(sequences.filter(bool), max_size=8), capacity=st.integers(0, 200))
def test_longest_prefix_equals_trying_one_by_one(
    running: list[tuple[int, int]], candidates: list[list[tuple[int, int]]], capacity: int
) -> None:
    seqs = running + [seq for candidate in candidates for seq in candidate]
    tokens = np.array([t for t, _ in seqs], np.int64)
    remaining = np.array([r for _, r in seqs], np.int64)
    ends = len(running) + np.cumsum(np.array([len(c) for c in candidates], np.int64))
    expected = 0
    while (
        expected < len(candidates)
        and predict_peak(tokens[: ends[expected]], remaining[: ends[expected]], 4) <= capacity
    ):
        expected += 1
    assert longest_prefix(tokens, remaining, ends, len(running), 4, capacity) == expected


def test_expected_output_length() -> None:
    lengths = OutputLength()
    assert lengths.average == PRIOR_OUTPUT_LEN
    decoded, most = np.array([0, 200, 400, 400]), np.array([1000, 1000, 1000, 420])
    assert lengths.expected(decoded, most).tolist() == [256, 328, 528, 420]


def test_average_follows_what_finishes() -> None:
    lengths = OutputLength()
    lengths.add(1)
    assert lengths.average > 0.9 * PRIOR_OUTPUT_LEN, "the first to finish is short; it must not decide alone"
    for _ in range(5000):
        lengths.add(40)
    assert lengths.average == pytest.approx(40, rel=1e-3)
