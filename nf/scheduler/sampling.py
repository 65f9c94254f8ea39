"""How sampling parameters are kept per slot and gathered into a SamplingBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf.request import Request
from nf.scheduler.batch import SamplingBatch
from nf.scheduler.decision import Slots

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Bias:
    """Values added to the logits of some token ids; no id occurs twice."""

    ids: Int32
    values: Float32


def _bias(values: dict[int, float]) -> Bias:
    return Bias(np.array(list(values), np.int32), np.array(list(values.values()), np.float32))


@dataclass(frozen=True, slots=True)
class TokenLists:
    """The ragged parameters of one request. Most requests have none."""

    min_tokens: int  # outputs before which ``bias_before`` holds instead of ``bias``
    bias: Bias
    bias_before: Bias  # the same, with the stop tokens forbidden
    allowed: Int32
    bad_words: tuple[Int32, ...]

    @classmethod
    def of(cls, request: Request) -> TokenLists:
        params = request.params
        biases = dict(params.logit_bias or {})
        # Forbidding overrides any bias; an id must not stand twice.
        forbidding = biases | dict.fromkeys(request.stop_token_ids, -np.inf)
        return cls(
            min_tokens=params.min_tokens if request.stop_token_ids else 0,
            bias=_bias(biases),
            bias_before=_bias(forbidding),
            allowed=np.array(params.allowed_token_ids or (), np.int32),
            bad_words=tuple(np.array(word, np.int32) for word in request.bad_words),
        )

    @property
    def any(self) -> bool:
        return bool(self.min_tokens or len(self.bias.ids) or len(self.allowed) or self.bad_words)

    def bias_at(self, num_outputs: int) -> Bias:
        """The bias for the token that follows ``num_outputs`` generated ones."""
        return self.bias_before if num_outputs < self.min_tokens else self.bias


NO_LISTS = TokenLists(0, _bias({}), _bias({}), np.zeros(0, np.int32), ())


@dataclass(frozen=True, slots=True)
class _Gathered:
    """What sampling needs of some slots and does not change from step to step, under the names of a SamplingBatch.

    Most steps decode the sequences of the step before, and so take it as it is.
    """

    slots: Slots
    columns: dict[str, NDArray[Any]]
    no_lists: dict[str, Any] | None  # empty lists; None if some slot has lists, which change with min_tokens


class SamplingTable:
    """Sampling parameters of the sequences, arrays over slots."""

    def __init__(self, num_slots: int) -> None:
        self.floats: dict[str, NDArray[Any]] = {name: np.zeros(num_slots, np.float32) for name in _FLOATS}
        self.prompt_lens: Int32 = np.zeros(num_slots, np.int32)
        self.top_k: Int32 = np.zeros(num_slots, np.int32)
        self.seeds: NDArray[np.uint64] = np.zeros(num_slots, np.uint64)
        self.sample_index: Int32 = np.zeros(num_slots, np.int32)
        self.logprobs: Int32 = np.zeros(num_slots, np.int32)
        self.prompt_logprobs: Int32 = np.zeros(num_slots, np.int32)  # -1: not asked for
        self.has_lists: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self.lists: list[TokenLists] = [NO_LISTS] * num_slots
        self._last: _Gathered | None = None

    def put(self, slot: int, request: Request, index: int, lists: TokenLists) -> None:
        """Give a slot the parameters of a request's continuation ``index``."""
        params = request.params
        for name, column in self.floats.items():
            column[slot] = getattr(params, name)
        self.prompt_lens[slot] = request.prompt_len
        self.top_k[slot] = params.top_k
        self.seeds[slot] = request.seed
        self.sample_index[slot] = index
        self.logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self.prompt_logprobs[slot] = -1 if params.prompt_logprobs is None else params.prompt_logprobs
        self.has_lists[slot] = lists.any
        self.lists[slot] = lists
        self._last = None

    def pass_on(self, slot: int, index: int) -> None:
        """The slot now belongs to continuation ``index`` of the same request."""
        self.sample_index[slot] = index
        self._last = None

    def gather(self, rows: Int32, slots: Slots, positions: Int32) -> SamplingBatch:
        """The batch that samples one token from each of ``rows`` into (slot, position)."""
        last = self._last
        if last is None or not np.array_equal(last.slots, slots):
            last = self._last = self._gather(slots)
        ragged = last.no_lists or self._ragged(slots, positions - last.columns["prompt_lens"])
        return SamplingBatch(rows=rows, positions=positions, **last.columns, **ragged)

    def _gather(self, slots: Slots) -> _Gathered:
        columns: dict[str, NDArray[Any]] = {
            "slots": slots.astype(np.int32),
            "prompt_lens": self.prompt_lens[slots],
            "top_k": self.top_k[slots],
            "seeds": self.seeds[slots],
            "sample_index": self.sample_index[slots],
            "logprobs": self.logprobs[slots],
        }
        columns |= {name: column[slots] for name, column in self.floats.items()}
        return _Gathered(slots, columns, None if self.has_lists[slots].any() else _no_lists(len(slots)))

    def _ragged(self, slots: Slots, num_outputs: Int32) -> dict[str, Any]:
        """The lists of the few rows that have some, in CSR form."""
        rows = np.flatnonzero(self.has_lists[slots])
        lists = [self.lists[slot] for slot in slots[rows].tolist()]
        biases = [found.bias_at(count) for found, count in zip(lists, num_outputs[rows].tolist(), strict=True)]
        words = [word for found in lists for word in found.bad_words]

        def indptr(counts: list[int]) -> Int32:
            per_row = np.zeros(len(slots), np.int32)
            per_row[rows] = counts
            return _indptr(per_row)

        return {
            "bias_indptr": indptr([len(bias.ids) for bias in biases]),
            "bias_ids": _concatenate([bias.ids for bias in biases], np.int32),
            "bias_values": _concatenate([bias.values for bias in biases], np.float32),
            "allowed_indptr": indptr([len(found.allowed) for found in lists]),
            "allowed_ids": _concatenate([found.allowed for found in lists], np.int32),
            "bad_words_indptr": indptr([len(found.bad_words) for found in lists]),
            "bad_words_token_indptr": _indptr([len(word) for word in words]),
            "bad_words_ids": _concatenate(words, np.int32),
        }


def _indptr(counts: Sequence[int] | Int32) -> Int32:
    indptr = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def _concatenate(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    filled = [part for part in parts if len(part)]
    return np.concatenate(filled) if filled else np.zeros(0, dtype)


def _no_lists(num_rows: int) -> dict[str, Any]:
    indptr, ids = np.zeros(num_rows + 1, np.int32), np.zeros(0, np.int32)
    return {
        "bias_indptr": indptr,
        "bias_ids": ids,
        "bias_values": np.zeros(0, np.float32),
        "allowed_indptr": indptr,
        "allowed_ids": ids,
        "bad_words_indptr": indptr,
        "bad_words_token_indptr": np.zeros(1, np.int32),
        "bad_words_ids": ids,
    }
