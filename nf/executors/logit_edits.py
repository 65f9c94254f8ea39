"""What a request changes in its logits before a token is chosen: allowed ids, bad words, bias, penalties."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nf.scheduler.batch import Int32, SamplingBatch

Float32 = NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)

FORBIDDEN = np.float32(-np.inf)


def edit_logits(logits: Float32, sampling: SamplingBatch, tokens: Int32) -> Float32:
    """Logits with every request's edits, in vLLM's order; a copy where anything changes.

    Args:
        logits: float32 [R, vocab_size].
        sampling: of the R rows.
        tokens: int32 [slots, positions], the token buffer.
    """
    penalized = (
        (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0) | (sampling.repetition_penalty != 1)
    )
    allowed, worded, biased = (
        np.diff(indptr) > 0 for indptr in (sampling.allowed_indptr, sampling.bad_words_indptr, sampling.bias_indptr)
    )
    edited = np.flatnonzero(penalized | allowed | worded | biased)
    if not len(edited):
        return logits
    logits = logits.copy()
    for i in edited:
        row = logits[i]
        history = tokens[sampling.slots[i], : sampling.positions[i]]
        if allowed[i]:
            _allow(row, _slice(sampling.allowed_ids, sampling.allowed_indptr, i))
        if worded[i]:
            _forbid_words(row, history, sampling, i)
        if biased[i]:
            ids = _slice(sampling.bias_ids, sampling.bias_indptr, i)
            np.add.at(row, ids, _slice(sampling.bias_values, sampling.bias_indptr, i))
        if penalized[i]:
            _penalize(row, history, sampling, i)
    return logits


def _allow(row: Float32, ids: Int32) -> None:
    kept = row[ids]
    row.fill(FORBIDDEN)
    row[ids] = kept


def _forbid_words(row: Float32, history: Int32, sampling: SamplingBatch, i: np.intp) -> None:
    """Forbid the last token of each word whose other tokens are what the sequence, prompt included, ends with."""
    for word in range(sampling.bad_words_indptr[i], sampling.bad_words_indptr[i + 1]):
        ids = _slice(sampling.bad_words_ids, sampling.bad_words_token_indptr, word)
        before = len(ids) - 1
        if len(history) >= before and np.array_equal(history[len(history) - before :], ids[:-1]):
            row[ids[-1]] = FORBIDDEN


def _penalize(row: Float32, history: Int32, sampling: SamplingBatch, i: np.intp) -> None:
    """Repetition over prompt and output (Keskar et al., arXiv 1909.05858), the others over output alone (OpenAI)."""
    repetition = sampling.repetition_penalty[i]
    if repetition != 1:
        seen = np.unique(history)
        values = row[seen]
        row[seen] = np.where(values > 0, values / repetition, values * repetition)
    output, counts = np.unique(history[sampling.prompt_lens[i] :], return_counts=True)
    row[output] -= sampling.frequency_penalty[i] * counts.astype(np.float32) + sampling.presence_penalty[i]


def _slice(values: NDArray[Scalar], indptr: Int32, i: int | np.intp) -> NDArray[Scalar]:
    return values[indptr[i] : indptr[i + 1]]
