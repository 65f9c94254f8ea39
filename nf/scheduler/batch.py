"""Batch: everything an executor needs to know about one step, as flat arrays (S sequences, T tokens, R samples).

Rows of the dense batch are tokens: first one row per decoding sequence, then the prefill chunks, in the order of
``slots``. Input token ids live in the executor's token buffer ``[slot, position]``; the batch carries only those the
executor has not seen. A sampled token is written there by the step that samples it, so the next step can be
launched before the host knows it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Per sampled token (R): where its logits come from, where it goes and how it is chosen.

    ``bias_*``, ``allowed_*`` and ``bad_words_*`` are ragged lists in CSR form, empty for most rows.
    """

    rows: Int32  # [R] row of the dense batch whose logits are sampled; n > 1 repeats a row
    slots: Int32  # [R] slot of the token buffer the sampled token is written to
    positions: Int32  # [R] position it is written at
    prompt_lens: Int32  # [R] positions below are prompt, from here on output (for penalties)
    temperature: Float32  # [R] 0 is greedy
    top_k: Int32  # [R] 0 keeps all
    top_p: Float32  # [R]
    min_p: Float32  # [R]
    presence_penalty: Float32  # [R]
    frequency_penalty: Float32  # [R]
    repetition_penalty: Float32  # [R]
    seeds: NDArray[np.uint64]  # [R] Philox key
    sample_index: Int32  # [R] which of the request's n continuations
    logprobs: Int32  # [R] how many most likely tokens to report; -1 reports nothing
    bias_indptr: Int32  # [R+1]
    bias_ids: Int32  # added to logits; -inf forbids (EOS before min_tokens)
    bias_values: Float32
    allowed_indptr: Int32  # [R+1] empty slice: all tokens are allowed
    allowed_ids: Int32
    bad_words_indptr: Int32  # [R+1] → words
    bad_words_token_indptr: Int32  # [words+1] → tokens
    bad_words_ids: Int32


@dataclass(frozen=True, slots=True)
class PromptLogprobsBatch:
    """Per prompt token whose log-probability was asked for (P): the row that predicts it and its id."""

    rows: Int32  # [P] row of the dense batch: the token before
    slots: Int32  # [P]
    targets: Int32  # [P] id of the prompt token that follows
    logprobs: Int32  # [P] how many most likely tokens to report


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Page tables are FlashInfer's ragged layout: kv_indptr, kv_indices, last_page_len."""

    step: int
    num_decode: int  # rows [0, num_decode) decode; the rest are prefill chunks
    token_ids: Int32  # [T] -1: already in the token buffer
    token_slots: Int32  # [T]
    positions: Int32  # [T]
    slots: Int32  # [S]
    qo_indptr: Int32  # [S+1] rows of each sequence
    kv_lens: Int32  # [S] tokens in the KV cache once this step has appended its own
    kv_indptr: Int32  # [S+1]
    kv_indices: Int32  # [pages]
    last_page_len: Int32  # [S]
    sampling: SamplingBatch
    prompt_logprobs: PromptLogprobsBatch
    # Done before the step's first append, in this order; each row is (source, destination).
    swap_out: Int32  # [*, 2] device page → host page
    swap_in: Int32  # [*, 2] host page → device page
    page_copies: Int32  # [*, 2] device page → device page (a shared, partly filled page gets its own copy)
    # Done once ``token_ids`` are in the token buffer and before sampling: a sibling's first token is sampled by this
    # very step, and penalties and bad words read the prompt from the sibling's own row.
    forks: Int32  # [*, 3] (source slot, destination slot, length): copy the start of a token-buffer row

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def num_seqs(self) -> int:
        return len(self.slots)

    @property
    def decode_keys(self) -> int:
        """That the decode tokens see together, themselves included."""
        return int(self.kv_lens[: self.num_decode].sum())


def without_sampling(batch: Batch) -> Batch:
    """The same step, but nothing is sampled and no log-probability is asked for."""
    return replace(batch, sampling=_empty(SamplingBatch), prompt_logprobs=_empty(PromptLogprobsBatch))


_Part = TypeVar("_Part", SamplingBatch, PromptLogprobsBatch)


def _empty(kind: type[_Part]) -> _Part:
    """No rows: every list is empty, and every list of ends has its first zero."""
    dtypes = {"Float32": np.float32, "NDArray[np.uint64]": np.uint64}
    return kind(
        **{
            field.name: np.zeros(int(field.name.endswith("indptr")), dtypes.get(str(field.type), np.int32))
            for field in fields(kind)
        }
    )
