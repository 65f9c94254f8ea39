"""Choosing tokens from logits: filters, and the Gumbel-max trick with counter-based noise.

The order is vLLM's: allowed ids, bad words, logit bias, penalties (logit_edits.py); then greedy rows are done, and the
others go through temperature, min-p, top-k, top-p. A token is argmax over the surviving ids of logit/T − log(−log u)
(Gumbel 1954; Maddison et al., arXiv 1411.0030), where u is a function of (seed, position, continuation, token id): so
the choice depends neither on the batch nor on the order in which survivors are looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nf.executors.logit_edits import edit_logits
from nf.executors.philox import noise_of, noise_of_all
from nf.scheduler.batch import Int32, SamplingBatch

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]

DENSE_FLOATS = 1 << 17  # noise of whole rows is drawn for so many tokens at a time, to stay in the cache


def sample(logits: Float32, sampling: SamplingBatch, tokens: Int32) -> Int32:
    """Choose one token per row.

    Args:
        logits: float32 [R, vocab_size]; not changed.
        sampling: how, for each of the R rows.
        tokens: int32 [slots, positions], the token buffer: penalties and bad words read a row's history there.

    Returns:
        int32 [R]; −1 where there is nothing to choose from: the logits hold NaN or +inf, or every token is forbidden.
        Of equally good tokens the lowest id is taken.
    """
    if not len(logits):
        return np.zeros(0, np.int32)
    sound = np.isfinite(logits.max(axis=1))  # max hands on NaN
    logits = edit_logits(logits, sampling, tokens)
    highest = logits.max(axis=1)
    sound &= np.isfinite(highest)
    token_ids = np.full(len(logits), -1, np.int32)
    greedy = np.flatnonzero(sound & (sampling.temperature == 0))
    if len(greedy):
        token_ids[greedy] = logits[greedy].argmax(axis=1)
    drawn = np.flatnonzero(sound & (sampling.temperature > 0))
    if len(drawn):
        # Scaled so that the most likely token has 0: then no temperature, however small, overflows.
        scaled = (logits[drawn] - highest[drawn, None]) / sampling.temperature[drawn, None]
        token_ids[drawn] = _draw(scaled, drawn, sampling)
    return token_ids


def _draw(scaled: Float32, rows: Index, sampling: SamplingBatch) -> Index:
    """Token of each row of ``scaled``, which belong to ``rows`` of the batch."""
    vocab_size = scaled.shape[1]
    chosen = np.empty(len(rows), np.intp)
    filtered = (sampling.top_k[rows] > 0) | (sampling.top_p[rows] < 1) | (sampling.min_p[rows] > 0)
    few = np.zeros(len(rows), bool)  # rows with so few survivors that noise is drawn for those alone
    limited = np.flatnonzero(filtered)
    if len(limited):
        keep, counts = _survivors(scaled[limited], rows[limited], sampling)
        few[limited] = counts * 4 < vocab_size  # a counter gives noise for four neighbouring ids
        sparse = few[limited]
        if sparse.any():
            of_few = limited[sparse]
            chosen[of_few] = _argmax_of_few(scaled[of_few], keep[sparse], rows[of_few], sampling)
        scaled[limited] = np.where(keep, scaled[limited], np.float32(-np.inf))
    many = np.flatnonzero(~few)
    step = max(1, DENSE_FLOATS // vocab_size)
    for start in range(0, len(many), step):
        part = many[start : start + step]
        chosen[part] = _argmax_of_many(scaled[part], rows[part], sampling)
    return chosen


def _argmax_of_many(scaled: Float32, rows: Index, sampling: SamplingBatch) -> Index:
    noise = noise_of_all(sampling.seeds[rows], sampling.positions[rows], sampling.sample_index[rows], scaled.shape[1])
    noise += scaled
    best: Index = noise.argmax(axis=1)
    return best


def _argmax_of_few(scaled: Float32, keep: Bool, rows: Index, sampling: SamplingBatch) -> Index:
    row, token = np.nonzero(keep)  # at least one per row
    batch_row = rows[row]
    noise = noise_of(token, sampling.seeds[batch_row], sampling.positions[batch_row], sampling.sample_index[batch_row])
    score = scaled[row, token] + noise
    best = np.maximum.reduceat(score, np.searchsorted(row, np.arange(len(rows))))
    winners = np.flatnonzero(score == best[row])
    _, first = np.unique(row[winners], return_index=True)
    chosen: Index = token[winners[first]]
    return chosen


def _survivors(scaled: Float32, rows: Index, sampling: SamplingBatch) -> tuple[Bool, Index]:
    """Which tokens min-p, top-k and top-p leave, bool like ``scaled``, and how many per row, at least one.

    Every filter keeps a prefix of the tokens in order of probability (ties: lower id first), so what a row keeps is
    just a number.
    """
    top_k, top_p = sampling.top_k[rows], sampling.top_p[rows].astype(np.float64)
    ordered = _descending(scaled, top_k)
    width = scaled.shape[1]
    counts = np.count_nonzero(ordered >= np.log(sampling.min_p[rows])[:, None], axis=1)  # log 0 = −inf keeps all
    counts = np.minimum(counts, np.where(top_k > 0, np.minimum(top_k, width), width))
    mass = np.cumsum(np.exp(ordered), axis=1, dtype=np.float64)
    wanted = top_p * mass[np.arange(len(rows)), counts - 1]
    smallest = 1 + np.count_nonzero(mass < wanted[:, None], axis=1)
    counts = np.where(top_p < 1, np.minimum(counts, smallest), counts)
    return _first_of_each(scaled, ordered, counts), counts


def _descending(scaled: Float32, top_k: Int32) -> Float32:
    """Values of each row from the largest down: all of them, or only as many as top-k may keep in any row."""
    negated = -scaled
    most = int(top_k.max())
    if 0 < most < scaled.shape[1] and (top_k > 0).all():
        negated = np.partition(negated, most - 1, axis=1)[:, :most]
    negated.sort(axis=1)
    return np.negative(negated, out=negated)


def _first_of_each(scaled: Float32, ordered: Float32, counts: Index) -> Bool:
    """Mask of the ``counts`` most likely tokens of each row, the lower ids among ties."""
    threshold = ordered[np.arange(len(counts)), counts - 1, None]
    keep = scaled > threshold
    ties = scaled == threshold
    wanted = (counts - np.count_nonzero(keep, axis=1))[:, None]
    if (np.count_nonzero(ties, axis=1, keepdims=True) > wanted).any():
        ties &= np.cumsum(ties, axis=1) <= wanted
    keep |= ties
    return keep
