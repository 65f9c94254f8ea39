"""Time and energy of GPU work at steady state.

Clocks follow power within a few hundred milliseconds, so timings shorter than that run at burst clocks and mislead:
everything is warmed up and then timed for long enough, as replays of a CUDA graph, so that the host's launches do not
count. Energy is the card's own counter, all of the card included; it moves ten times a second, so power is taken
between two of its steps.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nf.bench.power import PowerMeter
from nf.errors import NfError

WARM_SECONDS = 0.4
RUN_SECONDS = 0.5
CALLS_PER_GRAPH = 20  # at least; a graph of rotating buffers holds each of them equally often

Call = Callable[[int], None]
"""Launches the work to be measured, once, on the stream (an integer) it is given."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one call: ``seconds`` and ``joules``; ``watts`` on average. Energy is NaN where the driver does not tell, or
    the run was too short for it."""

    seconds: float
    joules: float

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


def need_cupy() -> None:
    """Raise NfError if cupy, which times and compares, is not installed."""
    if importlib.util.find_spec("cupy") is None:
        raise NfError("cupy is not installed (pip install 'nf[cuda]')")


def measure(
    calls: list[Call], *, warm: float = WARM_SECONDS, run: float = RUN_SECONDS, on: int | None = None
) -> Measurement:
    """Mean time and energy of one call, taking ``calls`` in turn.

    Args:
        calls: the same work on different buffers, together larger than the L2 cache where memory traffic matters.
        warm, run: seconds.
        on: stream, e.g. of an SM partition; None makes one.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True) if on is None else cupy.cuda.ExternalStream(on)
    rounds = -(-CALLS_PER_GRAPH // len(calls))
    cupy.cuda.Device().synchronize()  # the buffers were filled on another stream
    with stream:
        for call in calls:  # loads modules, which a capture must not
            call(stream.ptr)
        stream.synchronize()
        stream.begin_capture()
        for _ in range(rounds):
            for call in calls:
                call(stream.ptr)
        graph = stream.end_capture()
        once = _replay(graph, stream, 1)
        _replay(graph, stream, max(1, round(warm / once)))
        once = _replay(graph, stream, max(1, round(0.1 / once)))
        replays = max(1, round(run / once))
        with PowerMeter(cupy.cuda.Device().id) as meter:
            seconds = _replay(graph, stream, replays) / (rounds * len(calls))
    return Measurement(seconds, seconds * meter.watts)


def _replay(graph: Any, stream: Any, count: int) -> float:
    """Seconds per replay, by events."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    for _ in range(count):
        graph.launch(stream)
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / count
