"""How much KV memory the running sequences will need, so that a new one is admitted only if its future fits too.

NanoFlow (arXiv 2408.12757) predicts the peak from the tokens decoded so far and the average decode length. Here every
sequence is taken to append one token per step until its expected length and then to free its pages. Between two such
ends memory only grows, so the peak lies at one of the ends, and all ends are evaluated at once with one sort and one
running sum. Prefill is taken to need no time: its pages are all reserved on admission.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

PRIOR_OUTPUT_LEN = 256.0
"""Mean output length, tokens, until requests have finished: that of Splitwise, LMSYS-Chat-1M and ShareGPT (211, 222
and 322; NanoFlow, table 4)."""
PRIOR_WEIGHT = 16
"""Finished sequences the prior counts for. The first to finish are the short ones; they must not decide alone."""
WINDOW = 512
"""Finished sequences the average remembers, so that it follows a changing load."""


class OutputLength:
    """Running average of the output lengths of finished sequences, tokens."""

    def __init__(self) -> None:
        self.average = PRIOR_OUTPUT_LEN
        self._count = PRIOR_WEIGHT

    def add(self, num_tokens: int) -> None:
        self._count = min(self._count + 1, WINDOW)
        self.average += (num_tokens - self.average) / self._count

    def expected(self, decoded: Int64, most: Int64) -> Int64:
        """Tokens a sequence is expected to generate in all, given how many it has and may have at most.

        Output lengths spread about as widely as their mean (table 4), so one that has outlived the average is
        expected to go on: for half an average more.
        """
        expected: Int64 = np.ceil(np.maximum(self.average, decoded + self.average / 2)).astype(np.int64)
        return np.minimum(expected, most)


def predict_peak(tokens: Int64, remaining: Int64, page_size: int) -> int:
    """Pages that sequences with ``tokens`` in the cache will need at once if each appends ``remaining`` more.

    An upper bound: a sequence's last page is taken to hold one token. It exceeds the exact peak by less than one page
    per sequence.

    Args:
        tokens: [S] tokens whose KV is held now.
        remaining: [S] tokens each appends, one per step, before its pages are freed.
        page_size: tokens per page.
    """
    if not len(tokens):
        return 0
    order = np.argsort(remaining)[::-1]
    until = remaining[order]
    alive = np.arange(1, len(order) + 1)  # sequences that last at least until[k]: those before k, and k
    at_ends = np.cumsum(tokens[order]) + alive * (until + page_size - 1)
    return int(at_ends.max()) // page_size


def longest_prefix(
    tokens: Int64, remaining: Int64, ends: Int64, num_running: int, page_size: int, capacity: int
) -> int:
    """How many of the first candidates fit beside the running sequences, by predicted peak.

    Args:
        tokens, remaining: [S] as in ``predict_peak``; the running sequences first, then the candidates' in order.
        ends: [candidates] index just after each candidate's last sequence.
        num_running: sequences that run already.
        page_size: tokens per page.
        capacity: pages they may use together.

    Returns:
        The largest k for which the first k candidates fit; more candidates never need less, so bisection finds it.
    """

    def fits(count: int) -> bool:
        stop = int(ends[count - 1]) if count else num_running
        return predict_peak(tokens[:stop], remaining[:stop], page_size) <= capacity

    low, high = 0, len(ends)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
