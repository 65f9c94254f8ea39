"""What a step sampled, from its place on the GPU, which never changes, to the host.

The token ids alone come back in one copy, and with them the log-probabilities if any row asked for some; those of
prompts in one more.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf.executors.array_layout import ArrayLayout, ArrayShape
from nf.executors.base import StepResult, TopLogprobs
from nf.kernels.device import DeviceMemory, Event, PinnedMemory, copy
from nf.kernels.sampling import MAX_LOGPROBS, LogprobArrays
from nf.scheduler.batch import Batch, Int32

RING = 4  # steps whose results may wait on the host before somebody reads them


class StepOutputs:
    """Device arrays that sampling writes, and pinned memory they are copied to.

    ``token_ids`` (int32 [max_num_seqs]), ``logprobs`` (max_num_seqs rows) and ``prompt_logprobs`` (dense_batch_size
    rows) are device addresses.

    Args:
        max_num_seqs: most tokens a step samples.
        dense_batch_size: most prompt log-probabilities of a step.
        vocab_size: bounds how many most likely tokens there are.

    Raises:
        CudaError: there is no room for them; nothing stays allocated.
    """

    def __init__(self, *, max_num_seqs: int, dense_batch_size: int, vocab_size: int) -> None:
        self._most = min(MAX_LOGPROBS, vocab_size)
        self._sampled = ArrayLayout([("token_ids", np.int32, (max_num_seqs,)), *_logprob_arrays(max_num_seqs)])
        self._prompt = ArrayLayout(_logprob_arrays(dense_batch_size))
        with ExitStack() as undo:
            self._memory = DeviceMemory(self._sampled.num_bytes + self._prompt.num_bytes, "the results of a step")
            undo.callback(self._memory.free)
            self._memory.zero()
            self._ring = [_Landing(self._sampled, self._prompt, undo) for _ in range(RING)]
            self._undo = undo.pop_all()
        self._next = 0
        sampled = self._sampled.pointers(self._memory.pointer)
        prompt = self._prompt.pointers(self._memory.pointer + self._sampled.num_bytes)
        self.token_ids = sampled["token_ids"]
        self.logprobs = LogprobArrays(*(sampled[name] for name in LogprobArrays._fields))
        self.prompt_logprobs = LogprobArrays(*(prompt[name] for name in LogprobArrays._fields))

    def download(self, batch: Batch, stream: int) -> PendingResult:
        """Enqueue copies of what a step has sampled.

        The memory they land in is used again RING steps later: a result that nobody has read by then is read first,
        which waits for that step.
        """
        landing = self._ring[self._next]
        self._next = (self._next + 1) % RING
        if landing.pending is not None:
            landing.pending.result()
        sampling, prompt = batch.sampling, batch.prompt_logprobs
        base, target = self._memory.pointer, landing.memory.pointer
        asked = bool((sampling.logprobs >= 0).any())
        copy(target, base, self._sampled.num_bytes if asked else sampling.rows.nbytes, stream)
        if len(prompt.rows):
            start = self._sampled.num_bytes
            copy(target + start, base + start, self._prompt.num_bytes, stream)
        landing.landed.record(stream)
        landing.pending = PendingResult(
            landing, len(sampling.rows), sampling.logprobs if asked else None, prompt.logprobs, self._most
        )
        return landing.pending

    def free(self) -> None:
        """Give all memory back; idempotent. Results not read by now are lost, and no copy may be under way."""
        self._undo.close()
        self._ring.clear()  # its views keep the pages of the host


class PendingResult:
    """A step's result on its way to the host; any thread may wait for it.

    Args:
        landing: where it lands.
        num_samples: tokens sampled.
        wanted: [num_samples] most likely tokens asked for; None if no row asked.
        prompt_wanted: the same of the prompt log-probabilities, empty if there are none.
        most: as many as there can be.
    """

    def __init__(
        self, landing: _Landing, num_samples: int, wanted: Int32 | None, prompt_wanted: Int32, most: int
    ) -> None:
        self._landing: _Landing | None = landing
        self._num_samples = num_samples
        self._wanted = wanted
        self._prompt_wanted = prompt_wanted
        self._most = most
        self._lock = threading.Lock()
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """Wait, asleep, and return what the step sampled, in arrays of its own.

        Raises:
            CudaError: the step failed.
        """
        with self._lock:
            if self._result is None:
                assert self._landing is not None
                self._landing.landed.synchronize()
                self._result = self._read(self._landing)
                self._landing = None
            return self._result

    def _read(self, landing: _Landing) -> StepResult:
        sampled = landing.sampled
        result = StepResult(sampled["token_ids"][: self._num_samples].copy(), None, None)
        if self._wanted is not None:
            result = replace(result, logprobs=_top_logprobs(sampled, self._wanted, self._most))
        if len(self._prompt_wanted):
            result = replace(result, prompt_logprobs=_top_logprobs(landing.prompt, self._prompt_wanted, self._most))
        return result


class _Landing:
    """Pinned memory for one step's results; ``undo`` frees it."""

    def __init__(self, sampled: ArrayLayout, prompt: ArrayLayout, undo: ExitStack) -> None:
        self.landed = Event()
        undo.callback(self.landed.free)
        self.memory = PinnedMemory(sampled.num_bytes + prompt.num_bytes)
        undo.callback(self.memory.free)
        self.sampled = sampled.views(self.memory.array[: sampled.num_bytes])
        self.prompt = prompt.views(self.memory.array[sampled.num_bytes :])
        self.pending: PendingResult | None = None


def _logprob_arrays(rows: int) -> list[ArrayShape]:
    return [
        ("logprobs", np.float32, (rows,)),
        ("ranks", np.int32, (rows,)),
        ("top_ids", np.int32, (rows, MAX_LOGPROBS)),
        ("top_logprobs", np.float32, (rows, MAX_LOGPROBS)),
    ]


def _top_logprobs(arrays: dict[str, NDArray[Any]], wanted: Int32, most: int) -> TopLogprobs:
    """Copies of the first rows, as wide as the widest wish; a row that asked for nothing holds no probability."""
    columns = min(int(wanted.max()), most)
    rows = len(wanted)
    top = TopLogprobs(
        arrays["logprobs"][:rows].copy(),
        arrays["ranks"][:rows].copy(),
        arrays["top_ids"][:rows, :columns].copy(),
        arrays["top_logprobs"][:rows, :columns].copy(),
    )
    # What was not asked for the device has left as it was: all of a row, or its list of the most likely tokens.
    silent, unlisted = wanted < 0, wanted <= 0
    if unlisted.any():
        top.logprobs[silent], top.ranks[silent] = -np.inf, 0
        top.top_ids[unlisted], top.top_logprobs[unlisted] = -1, -np.inf
    return top
