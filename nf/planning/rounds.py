"""Rounds: a layer's tasks repeated at a steady pace, and the least period that an order allows.

Round r runs every task once, a task with lag g on layer r − g. Task j waits for task i of as many rounds before as the
*height* of the edge i → j says: a dependency over d layers has height lag(j) − lag(i) + d, the next task of a lane
height 0, and the first of a lane waits for the last of the round before, height 1. Executed as early as possible,
such a system settles at a period equal to the largest (seconds / height) of all its circles (Baccelli, Cohen, Olsder
and Quadrat, Synchronization and Linearity, 1992, chapter 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from nf.graphs.plan import NanoOperation, PipelinePlan, Stream
from nf.planning.nano_layer import NanoLayer
from nf.planning.profile import Sms

PRIORITY = {"compute": 0}  # lanes of small kernels are more urgent: they must find room between the tiles of a GEMM
TOLERANCE = 1e-9

Edge = tuple[int, int, int]
"""(from, to, height in rounds)"""


@dataclass(frozen=True)
class Rounds:
    """A layer with an order: which task follows which on each lane, and how many rounds each lags behind.

    Args:
        order: lane → its tasks in the order of a round.
        lags: per task.
    """

    layer: NanoLayer
    order: Mapping[str, tuple[int, ...]]
    lags: tuple[int, ...]

    @cached_property
    def waits(self) -> tuple[Edge, ...]:
        """What the dependencies demand."""
        return tuple(
            (before, after, self.lags[after] - self.lags[before] + gap)
            for after, dependencies in enumerate(self.layer.dependencies)
            for before, gap in dependencies
        )

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """What the dependencies and the order of the lanes demand."""
        waits = list(self.waits)
        for tasks in self.order.values():
            waits += [(a, b, 0) for a, b in pairwise(tasks)]
            waits.append((tasks[-1], tasks[0], 1))
        return tuple(waits)

    def period(self, seconds: Sequence[float] | None = None) -> float:
        """Seconds per layer at steady state; ``seconds`` per task if not those of the layer."""
        return critical_circle(seconds or self.layer.seconds, self.edges)[0]

    def critical(self) -> tuple[int, ...]:
        """The tasks that hold the period where it is."""
        return critical_circle(self.layer.seconds, self.edges)[1]

    def starts(self) -> tuple[float, ...]:
        """Earliest start of every task in a steady round, in seconds; the earliest of all is 0."""
        seconds = self.layer.seconds
        period = self.period() * (1 + TOLERANCE)
        times = [0.0] * len(seconds)
        for _ in seconds:
            for before, after, height in self.edges:
                times[after] = max(times[after], times[before] + seconds[before] - height * period)
        first = min(times)
        return tuple(time - first for time in times)

    def plan(
        self,
        name: str,
        dense_batch_size: int,
        *,
        sms: Mapping[str, Sms] | None = None,
        model: str | None = None,
        gpu: str | None = None,
    ) -> PipelinePlan:
        """The pipeline plan with a stream per lane; ``sms`` per lane if not all."""
        tasks = self.layer.tasks
        ranges = sorted({(task.start, task.stop) for task in tasks})
        least = min(self.lags)
        streams = tuple(
            Stream(
                lane,
                tuple(
                    NanoOperation(
                        tasks[i].operation.name, ranges.index((tasks[i].start, tasks[i].stop)), self.lags[i] - least
                    )
                    for i in order
                ),
                sms=(sms or {}).get(lane, "all"),
                priority=PRIORITY.get(lane, -1),
            )
            for lane, order in self.order.items()
        )
        return PipelinePlan(name, dense_batch_size, tuple(ranges), streams, model, gpu)


def critical_circle(seconds: Sequence[float], edges: Sequence[Edge]) -> tuple[float, tuple[int, ...]]:
    """The largest ratio of seconds to height over all circles, and the tasks of a circle that reaches it.

    Newton's iteration on the period: as long as some circle takes longer than its height allows, its ratio is the next
    period (Dasdan, Experimental analysis of the fastest optimum cycle ratio algorithms, 2004).

    Raises:
        ValueError: a circle has no height: the order deadlocks.
    """
    period = 0.0
    circle: tuple[int, ...] = ()
    while found := _late_circle(seconds, edges, period):
        height = sum(edges[e][2] for e in found)
        if height <= 0:
            raise ValueError("tasks wait for each other within a round")
        tasks = tuple(edges[e][0] for e in found)
        ratio = sum(seconds[i] for i in tasks) / height
        if ratio <= period * (1 + TOLERANCE):
            break
        period, circle = ratio, tasks
    return period, circle


def _late_circle(seconds: Sequence[float], edges: Sequence[Edge], period: float) -> list[int]:
    """Edges of a circle that takes longer than ``period`` allows (Bellman and Ford), none if there is not any."""
    count = len(seconds)
    times = [0.0] * count
    came_by = [-1] * count
    slack = TOLERANCE * (period or max(seconds, default=0.0))
    moved = -1
    for _ in range(count + 1):
        moved = -1
        for index, (before, after, height) in enumerate(edges):
            time = times[before] + seconds[before] - height * period
            if time > times[after] + slack:
                times[after], came_by[after], moved = time, index, after
        if moved < 0:
            return []
    node = moved
    for _ in range(count):
        node = edges[came_by[node]][0]
    circle, at = [came_by[node]], edges[came_by[node]][0]
    while at != node:
        circle.append(came_by[at])
        at = edges[came_by[at]][0]
    return circle


def least_heights(count: int, edges: Iterable[Edge], limit: int) -> list[list[int]]:
    """Per pair of tasks, the least height of a way from one to the other; ``limit`` where there is none as low."""
    least = [[limit] * count for _ in range(count)]
    for before, after, height in edges:
        least[before][after] = min(least[before][after], height)
    for via in range(count):  # Floyd and Warshall
        onward = least[via]
        for row in least:
            if (first := row[via]) < limit:
                row[:] = [min(direct, first + second) for direct, second in zip(row, onward, strict=True)]
    return least
