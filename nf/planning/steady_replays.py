"""Graphs replayed at steady state, one or two beside each other: the pace of each while all run, and the card's power.

The host has no part in it: each has enough enqueued that the GPU never waits, and what was timed while the host was
held up for longer is timed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

from nf.bench.power import PowerMeter
from nf.graphs.capture import Graph
from nf.kernels import device as cuda

WARM_SECONDS = 0.15
AHEAD_SECONDS = 12e-3  # of replays that are enqueued and not done
PATIENCE_SECONDS = 0.5
TRIES = 3
POLL_SECONDS = 1e-4  # between looks at what is done
PROBES = 4  # replays that tell how long one takes


@dataclass(frozen=True, slots=True)
class Replays:
    """Of ``graph`` on ``origin``: ``calls`` of something each, about ``seconds`` long with nothing beside them."""

    graph: Graph
    calls: int
    origin: cuda.Stream
    seconds: float

    @property
    def depth(self) -> int:
        """How many to keep in flight."""
        return max(2, math.ceil(AHEAD_SECONDS / self.seconds))


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds per call of each side, the card's power meanwhile, and the longest time that the host was held up for."""

    seconds: list[float]
    watts: float
    held_up: float


def probed(graph: Graph, calls: int, origin: cuda.Stream) -> Replays:
    """With the shortest of a few, as the first ones load what they need and the host may be late with others. If one
    fails, the graph is freed."""
    with ExitStack() as undo:
        undo.callback(graph.free)
        with ExitStack() as events:
            marks = []
            for _ in range(PROBES):
                graph.launch(origin.handle)
                marks.append(_event(origin, events))
            origin.synchronize()
            shortest = min(end.since(start) for start, end in pairwise(marks))
        undo.pop_all()
    return Replays(graph, calls, origin, max(shortest, 1e-6))


def steady(sides: list[Replays], run: float) -> Pace:
    """The pace of each side while all of them run, for ``run`` seconds once they are warm; frees the graphs.

    Measured again where the host was held up for longer than what is enqueued lasts.
    """
    with ExitStack() as undo:
        for side in sides:
            undo.callback(side.graph.free)
        tried = [_try(sides, run)]
        while tried[-1].held_up > AHEAD_SECONDS and len(tried) < TRIES:
            tried.append(_try(sides, run))
    return min(tried, key=lambda pace: pace.held_up)


def _try(sides: list[Replays], run: float) -> Pace:
    with ExitStack() as undo:
        for side in sides:  # before the graphs are freed, whatever happens
            undo.callback(side.origin.synchronize)
        with PowerMeter(0) as meter:
            began = time.perf_counter()
            start, ends, held_up = _replay(sides, WARM_SECONDS + run, undo)
            for side in sides:
                side.origin.synchronize()
        ended = [[end.since(start) for end in own] for own in ends]
    stop = min(times[-1] for times in ended)
    seconds = [_seconds(times, stop) / side.calls for side, times in zip(sides, ended, strict=True)]
    return Pace(seconds, meter.between(began + WARM_SECONDS, began + stop), held_up)


def _replay(sides: list[Replays], seconds: float, undo: ExitStack) -> tuple[cuda.Event, list[list[cuda.Event]], float]:
    """Replay each side again and again, begun together, for so long by the host's clock; up to PATIENCE_SECONDS longer
    if one of them gets hardly anywhere beside the other.

    Both have enough enqueued at all times and no more, so that they end together however they slow each other down,
    and the host never waits for a full queue.

    Returns:
        An event before, and one after each replay of each side, which ``undo`` frees; the longest time between two
        looks at what is done.
    """
    before, held_up = time.perf_counter(), 0.0
    start = _event(sides[0].origin, undo)
    for side in sides[1:]:
        start.block(side.origin.handle)
    ends: list[list[cuda.Event]] = [[] for _ in sides]
    until = time.perf_counter() + seconds
    while (now := time.perf_counter()) < until or (now < until + PATIENCE_SECONDS and not all(map(_some_done, ends))):
        before, held_up = now, max(held_up, now - before)
        waits = True
        for side, own in zip(sides, ends, strict=True):
            if len(own) < side.depth or own[-side.depth].reached:
                side.graph.launch(side.origin.handle)
                own.append(_event(side.origin, undo))
                waits = False
        if waits:
            time.sleep(POLL_SECONDS)
    return start, ends, max(held_up, now - before)


def _some_done(ends: Sequence[cuda.Event]) -> bool:
    return len(ends) > 2 and ends[2].reached


def _seconds(ends: Sequence[float], stop: float) -> float:
    """Of a replay while both sides run, by when each ended; of the first one, if no other did, and if none did, a
    bound."""
    inside = [end for end in ends if WARM_SECONDS <= end <= stop]
    if len(inside) < 2:
        inside = [end for end in (0.0, *ends) if end <= stop][-2:]
    if len(inside) < 2:
        inside = [0.0, stop]
    return (inside[-1] - inside[0]) / (len(inside) - 1)


def _event(stream: cuda.Stream, undo: ExitStack) -> cuda.Event:
    """The point that ``stream`` has come to."""
    made = cuda.Event(timing=True)
    undo.callback(made.free)
    made.record(stream.handle)
    return made
