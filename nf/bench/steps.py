"""StepLog: an executor that notes when each step of another one ended and how many tokens it moved."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nf.executors.base import Executor, StepHandle
from nf.scheduler.batch import Batch

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step.

    Args:
        ended: when its tokens were on the host, seconds of the monotonic clock.
        rows: of the dense batch.
        input_tokens: prompt tokens it took for the first time.
        output_tokens: tokens it sampled.
    """

    ended: float
    rows: int
    input_tokens: int
    output_tokens: int


class StepLog:
    """Passes everything on to ``executor`` and keeps a record of every step since ``start``.

    Args:
        executor: runs the steps.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.page_size = executor.page_size
        self.num_pages = executor.num_pages
        self.num_host_pages = executor.num_host_pages
        self.records: list[StepRecord] = []
        self.kept: Batch | None = None
        self._rows = 0
        self._keep_after = 0

    def start(self, keep_after: int = 0) -> None:
        """Forget all steps; the first that begins after ``keep_after`` rows will be ``kept``."""
        self.records.clear()
        self.kept, self._rows, self._keep_after = None, 0, keep_after

    def submit(self, batch: Batch) -> StepHandle:
        """Enqueue one step; see Executor."""
        if self.kept is None and self._rows >= self._keep_after:
            self.kept = batch
        self._rows += batch.num_tokens
        counts = batch.num_tokens, int(np.count_nonzero(batch.token_ids >= 0)), len(batch.sampling.rows)
        handle = self.executor.submit(batch)
        handle.add_done_callback(lambda _: self.records.append(StepRecord(time.monotonic(), *counts)))
        return handle

    def close(self) -> None:
        """Close the executor; idempotent."""
        self.executor.close()


@dataclass(frozen=True, slots=True)
class Steady:
    """Rates while the middle half of all tokens was moved: neither filling up nor running dry. Tokens per second."""

    seconds: float
    input: float
    output: float
    total: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.input + self.output)


def steady(start: float, records: list[StepRecord]) -> Steady | None:
    """Rates between the moments when a quarter and when three quarters of the tokens in and out were done.

    Within a step tokens count as done evenly over its time. None if there are no tokens or no time passed.

    Args:
        start: when the first step could begin, seconds of the monotonic clock.
        records: in the order the steps ended.
    """
    times = np.array([start, *(record.ended for record in records)])
    input_, output = (
        np.cumsum([0, *counts]) for counts in ([r.input_tokens for r in records], [r.output_tokens for r in records])
    )
    done = input_ + output
    if not done[-1]:
        return None
    first, last = (_when(done, times, share * done[-1]) for share in (0.25, 0.75))
    if last <= first:
        return None
    moved = [float(np.diff(np.interp([first, last], times, count))[0]) for count in (input_, output)]
    return Steady(last - first, *(count / (last - first) for count in moved))


def _when(done: NDArray[np.int64], times: Float64, count: float) -> float:
    """The moment when ``count`` tokens were done."""
    step = int(np.searchsorted(done, count))  # the first with so many
    share = (count - done[step - 1]) / (done[step] - done[step - 1])
    return float(times[step - 1] + share * (times[step] - times[step - 1]))
