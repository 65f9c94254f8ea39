"""Log-probabilities of chosen tokens and of the most likely ones, from raw logits: before penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nf.executors.base import TopLogprobs

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


def top_logprobs(logits: Float32, chosen: Int32, count: int) -> TopLogprobs:
    """Natural-log probabilities at N positions.

    Args:
        logits: [N, vocab_size]; NaN counts as −inf.
        chosen: [N] token ids.
        count: K, how many most likely tokens to report; the vocabulary bounds it, and −1 counts as 0. Of equally
            likely tokens the lower id comes first.
    """
    logits = np.where(np.isnan(logits), np.float32(-np.inf), logits)
    highest = logits.max(axis=1, keepdims=True)
    normalizer = highest + np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
    of_chosen = np.take_along_axis(logits, chosen[:, None].astype(np.intp), axis=1)
    ranks = 1 + np.count_nonzero(logits > of_chosen, axis=1)
    top_ids = _most_likely(logits, max(0, min(count, logits.shape[1])))
    of_top = np.take_along_axis(logits, top_ids, axis=1)
    return TopLogprobs(
        (of_chosen - normalizer)[:, 0], ranks.astype(np.int32), top_ids.astype(np.int32), of_top - normalizer
    )


def concatenate(parts: Sequence[TopLogprobs]) -> TopLogprobs:
    """Join positions."""
    names = ("logprobs", "ranks", "top_ids", "top_logprobs")
    return TopLogprobs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _most_likely(logits: Float32, count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` largest logits of each row, largest first, [N, count]."""
    rows, width = logits.shape
    if not count:
        return np.zeros((rows, 0), np.intp)
    threshold = np.partition(logits, width - count, axis=1)[:, width - count, None]
    row, token = np.nonzero(logits >= threshold)  # at least ``count`` per row, more where there are ties
    order = np.lexsort((token, -logits[row, token], row))
    starts = np.searchsorted(row, np.arange(rows))
    ids: NDArray[np.intp] = token[order][starts[:, None] + np.arange(count)]
    return ids
