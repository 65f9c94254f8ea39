"""A step's inputs on the GPU, at addresses that never change, so that graphs captured once read every step's.

What every step has goes up in one copy: counts, rows, lengths, sampling parameters, and behind them the page table as
far as it is used. What few steps have (ragged sampling lists, page moves, forks, prompt log-probabilities) goes up in
further copies of what there is; the counts and indptr arrays of the first say that there is nothing.

Capacities are upper bounds that scheduler and request limits guarantee, so no step exceeds them:

- rows of the dense batch, prompt log-probabilities: dense_batch_size
- sequences, sampled tokens, forks, page copies: max_num_seqs
- pages: max_num_seqs · ⌈max_model_len / page_size⌉
- swapped pages: num_host_pages each way
- ragged lists: max_num_seqs times what one request may have, see MAX_BIASES and what nf/sampling_params.py names
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf.executors.array_layout import ArrayLayout, ArrayShape, aligned
from nf.kernels.device import DeviceMemory, Event, PinnedMemory, copy
from nf.kernels.sampling import SamplingArrays
from nf.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOKEN_LIST
from nf.scheduler.batch import Batch

RING = 3  # steps whose inputs may wait on the host for their copies
MAX_BIASES = MAX_LOGIT_BIAS + MAX_STOP_TOKENS  # of a row: stop tokens are forbidden by a bias of −∞
SPELLINGS = 2  # of a bad word: at the start of a text and after a space
FIRST_EXTRAS = 1 << 20  # bytes of staging for what few steps have; more is allocated when a step needs it

COUNTS = (
    "num_tokens", "num_decode", "num_seqs", "num_samples", "num_swap_out", "num_swap_in", "num_page_copies",
    "num_forks", "num_prompt_logprobs",
)  # fmt: skip

_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_INTS = ("rows", "slots", "positions", "prompt_lens", "top_k", "sample_index", "logprobs")
_INDPTRS = ("bias_indptr", "allowed_indptr", "bad_words_indptr")


class StepInputs:
    """Device arrays of one step, and staging on the host.

    ``pointers`` are device addresses by name: COUNTS (int32 [1] each), every array of a Batch under its name there, and
    those of its parts as ``sampling.rows`` or ``prompt_logprobs.targets``. ``sampling`` are those that sampling takes.

    Args:
        dense_batch_size, max_num_seqs, max_model_len, page_size, num_host_pages: bounds of a batch.
        ranges: (start, stop) of the dense batch; ``count`` points to how many rows each has.

    Raises:
        CudaError: there is no room for them; nothing stays allocated.
    """

    def __init__(
        self,
        *,
        dense_batch_size: int,
        max_num_seqs: int,
        max_model_len: int,
        page_size: int,
        num_host_pages: int,
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        unique = sorted(set(ranges))
        self._index = {part: len(COUNTS) + index for index, part in enumerate(unique)}
        self._starts = np.array([start for start, _ in unique], np.int32)
        self._lengths = np.array([stop - start for start, stop in unique], np.int32)

        max_pages = max_num_seqs * -(-max_model_len // page_size)
        usual = _usual_arrays(len(COUNTS) + len(unique), dense_batch_size, max_num_seqs, max_pages)
        extra = _extra_arrays(dense_batch_size, max_num_seqs, num_host_pages)
        self._usual, self._extra = ArrayLayout(usual), ArrayLayout(extra)
        self._names = [name for name, *_ in usual[1:]]
        self._arrays_of = attrgetter(*self._names)
        self._extra_names = [name for name, *_ in extra]
        self._extras_of = attrgetter(*self._extra_names)
        with ExitStack() as undo:
            self._memory = DeviceMemory(self._usual.num_bytes + self._extra.num_bytes, "the inputs of a step")
            undo.callback(self._memory.free)
            self._memory.zero()
            self._ring = [_Staging(self._usual, self._names, undo) for _ in range(RING)]
            self._undo = undo.pop_all()
        self._next = 0

        self.pointers = self._usual.pointers(self._memory.pointer)
        self.pointers |= self._extra.pointers(self._memory.pointer + self._usual.num_bytes)
        self.pointers |= {name: self.pointers["counts"] + 4 * index for index, name in enumerate(COUNTS)}
        sampled = [f"sampling.{field.name}" for field in fields(SamplingArrays)[1:]]
        self.sampling = SamplingArrays(self.pointers["num_samples"], *map(self.pointers.__getitem__, sampled))

    def count(self, start: int, stop: int) -> int:
        """Device pointer to int32 [1]: how many of the step's rows are in [start, stop), one of ``ranges``."""
        return self.pointers["counts"] + 4 * self._index[start, stop]

    def upload(self, batch: Batch, stream: int) -> None:
        """Enqueue copies of a step's arrays; what is beyond their ends is left as it was.

        The step before must have been read by then, so ``stream`` is the one it ran on. Waits only if the copies of the
        step RING before are still to be done.
        """
        staging = self._ring[self._next]
        self._next = (self._next + 1) % RING
        staging.copied.synchronize()
        self._count(batch, staging.counts)
        for view, array in zip(staging.views, self._arrays_of(batch), strict=True):
            view[: len(array)] = array
        used = self._usual.offsets["kv_indices"] + batch.kv_indices.nbytes
        copy(self._memory.pointer, staging.memory.pointer, used, stream)
        if _has_extras(batch):
            self._upload_extras(batch, staging, stream)
        staging.copied.record(stream)

    def free(self) -> None:
        """Give all memory back; idempotent. No copy may be under way."""
        self._undo.close()
        self._ring.clear()  # its views keep the pages of the host

    def _count(self, batch: Batch, counts: NDArray[np.int32]) -> None:
        num_tokens = batch.num_tokens
        counts[: len(COUNTS)] = (
            num_tokens, batch.num_decode, batch.num_seqs, len(batch.sampling.rows), len(batch.swap_out),
            len(batch.swap_in), len(batch.page_copies), len(batch.forks), len(batch.prompt_logprobs.rows),
        )  # fmt: skip
        np.minimum(np.maximum(num_tokens - self._starts, 0), self._lengths, out=counts[len(COUNTS) :])

    def _upload_extras(self, batch: Batch, staging: _Staging, stream: int) -> None:
        """One copy per array that is not empty: their places on the device are far apart, and most are empty."""
        arrays = [
            (name, array) for name, array in zip(self._extra_names, self._extras_of(batch), strict=True) if len(array)
        ]
        block = staging.extras(sum(aligned(array.nbytes) for _, array in arrays))
        offset = 0
        for name, array in arrays:
            assert array.nbytes <= self._extra.sizes[name], f"{name} has {len(array)} entries"
            block.array[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            copy(self.pointers[name], block.pointer + offset, array.nbytes, stream)
            offset += aligned(array.nbytes)


class _Staging:
    """Pinned memory for one step's arrays, and when it may be filled again; ``undo`` frees them."""

    def __init__(self, layout: ArrayLayout, names: Sequence[str], undo: ExitStack) -> None:
        self.copied = Event()
        undo.callback(self.copied.free)
        self.memory = PinnedMemory(layout.num_bytes)
        undo.callback(self.memory.free)
        views = layout.views(self.memory.array)
        self.counts: NDArray[np.int32] = views["counts"]
        self.views: list[NDArray[Any]] = [views[name] for name in names]
        self._extras = PinnedMemory(FIRST_EXTRAS)
        undo.callback(self._free_extras)

    def extras(self, num_bytes: int) -> PinnedMemory:
        """At least so many bytes more. Sizes double, so that a rising need allocates few times."""
        if num_bytes > self._extras.num_bytes:
            self._extras.free()
            self._extras = PinnedMemory(1 << (num_bytes - 1).bit_length())
        return self._extras

    def _free_extras(self) -> None:
        self._extras.free()  # perhaps larger than at first


def _usual_arrays(num_counts: int, dense_batch_size: int, max_num_seqs: int, max_pages: int) -> list[ArrayShape]:
    """What every step has: the counts first and the page table, of which only a part is copied, last."""
    tokens, seqs, ends = (dense_batch_size,), (max_num_seqs,), (max_num_seqs + 1,)
    return [
        ("counts", np.int32, (num_counts,)),
        *((name, np.int32, tokens) for name in ("token_ids", "token_slots", "positions")),
        *((name, np.int32, seqs) for name in ("slots", "kv_lens", "last_page_len")),
        *((name, np.int32, ends) for name in ("qo_indptr", "kv_indptr")),
        *((f"sampling.{name}", np.int32, seqs) for name in _INTS),
        *((f"sampling.{name}", np.float32, seqs) for name in _FLOATS),
        ("sampling.seeds", np.uint64, seqs),
        *((f"sampling.{name}", np.int32, ends) for name in _INDPTRS),
        ("kv_indices", np.int32, (max_pages,)),
    ]


def _extra_arrays(dense_batch_size: int, max_num_seqs: int, num_host_pages: int) -> list[ArrayShape]:
    """What few steps have."""
    biases, words = max_num_seqs * MAX_BIASES, max_num_seqs * MAX_BAD_WORDS * SPELLINGS
    return [
        ("swap_out", np.int32, (num_host_pages, 2)),
        ("swap_in", np.int32, (num_host_pages, 2)),
        ("page_copies", np.int32, (max_num_seqs, 2)),
        ("forks", np.int32, (max_num_seqs, 3)),
        *((f"prompt_logprobs.{name}", np.int32, (dense_batch_size,)) for name in ("rows", "targets", "logprobs")),
        ("sampling.bias_ids", np.int32, (biases,)),
        ("sampling.bias_values", np.float32, (biases,)),
        ("sampling.allowed_ids", np.int32, (max_num_seqs * MAX_TOKEN_LIST,)),
        ("sampling.bad_words_token_indptr", np.int32, (words + 1,)),
        ("sampling.bad_words_ids", np.int32, (max_num_seqs * MAX_BAD_WORD_TOKENS,)),
    ]


def _has_extras(batch: Batch) -> bool:
    sampling = batch.sampling
    return bool(
        len(batch.prompt_logprobs.rows)
        or len(batch.forks)
        or len(batch.swap_out)
        or len(batch.swap_in)
        or len(batch.page_copies)
        or len(sampling.bias_ids)
        or len(sampling.allowed_ids)
        or len(sampling.bad_words_ids)
    )
