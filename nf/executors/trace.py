"""Spans: when each nano-operation of a step ran, and on which stream."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from nf.scheduler.batch import Batch


@dataclass(frozen=True, slots=True)
class Span:
    """One nano-operation, or what stands around the layers (embedding, sampling), on one stream.

    Args:
        stream: its name.
        name: e.g. "qkv_proj [0, 1024) layer 3".
        start_us, duration_us: microseconds; starts count from an arbitrary moment, the same for all streams.
    """

    stream: str
    name: str
    start_us: float
    duration_us: float


class Traceable(Protocol):
    """An executor that can say where a step's time goes."""

    def trace(self, batch: Batch) -> list[Span]:
        """Run a step once more and time every nano-operation.

        Pages and slots that the step writes must no longer be needed by any request.
        """
        ...


class SpanRecorder:
    """Spans of work that runs strictly one after the other: each starts where the one before ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._start = self._last = time.perf_counter_ns()

    def ended(self, stream: str, name: str) -> None:
        """What began when the last span ended has ended now."""
        now = time.perf_counter_ns()
        self.spans.append(Span(stream, name, (self._last - self._start) / 1e3, (now - self._last) / 1e3))
        self._last = now
