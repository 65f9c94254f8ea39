"""The best order of a layer's tasks: the cyclic job shop as an integer program.

The variables are the pace τ (layers per second, so that everything stays linear) and the start u of every task, counted
in periods. Task j may start when task i of d layers before has ended: u(j) + d ≥ u(i) + seconds(i)·τ. Two tasks of one
lane do not overlap in any layer if for some integer K: u(j) + K ≥ u(i) + seconds(i)·τ and u(i) + 1 − K ≥ u(j) +
seconds(j)·τ (Hanen, Study of a NP-hard cyclic scheduling problem, 1994).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import combinations

from nf.planning.integer_program import IntegerProgram
from nf.planning.nano_layer import NanoLayer
from nf.planning.rounds import Rounds, critical_circle, least_heights

MAX_START = 6  # periods; a layer's tasks spread over no more rounds than that
ROUNDING = 1e-6  # periods


@dataclass(frozen=True, slots=True)
class Ordering:
    """The best order found and a proof of how good it can be.

    Args:
        rounds: None if no order with the wanted period is known.
        bound: seconds; no order has a shorter period. Infinite if there is none with the wanted one.
    """

    rounds: Rounds | None
    bound: float


def least_period(layer: NanoLayer) -> float:
    """A period that no order can beat: the busiest lane, or the longest circle of dependencies."""
    circles = [(before, after, gap) for after, waits in enumerate(layer.dependencies) for before, gap in waits]
    return max(*(layer.load(lane) for lane in layer.lanes), critical_circle(layer.seconds, circles)[0])


def best_order(layer: NanoLayer, seconds: float, *, shorter_than: float = math.inf) -> Ordering:
    """The order with the shortest period, and among those the one whose layers overlap least.

    Args:
        seconds: to search for.
        shorter_than: look only for orders with a shorter period, in seconds.
    """
    least = least_period(layer)
    if least >= shorter_than:
        return Ordering(None, math.inf)
    if least <= 0:
        raise ValueError("a layer takes no time at all")
    program = IntegerProgram()
    # Times in units of the least period keep the numbers near 1.
    pace = program.variable(least / shorter_than, 1.0, gain=1.0)
    starts, heights = _constrain(program, layer, pace, least)
    found = program.solve(seconds)
    if found.values is None:
        return Ordering(None, least / found.bound if found.bound > 0 else math.inf)
    reached = found.values[pace]
    program.gains[pace] = 0.0
    program.lower[pace] = program.upper[pace] = reached * (1 - 1e-7)
    last = program.variable(0.0, MAX_START + 2.0, gain=-1.0)
    for index, start in enumerate(starts):
        program.at_least({last: 1.0, start: -1.0, pace: -layer.seconds[index] / least}, 0.0)
    early = program.solve(min(seconds, 1.0), (*found.values, MAX_START + 2.0)).values or found.values
    after = {pair: round(early[height]) for pair, height in heights.items()}
    return Ordering(
        order_from_starts(layer, [early[start] for start in starts], after), max(least, least / found.bound)
    )


def _constrain(
    program: IntegerProgram, layer: NanoLayer, pace: int, unit: float
) -> tuple[list[int], dict[tuple[int, int], int]]:
    """Add the tasks; returns the variables of their starts, and of K per pair (i, j) of a lane."""
    length = [seconds / unit for seconds in layer.seconds]
    starts = [program.variable(0.0, MAX_START) for _ in layer.tasks]
    heights: dict[tuple[int, int], int] = {}
    dependencies = [(before, after, gap) for after, waits in enumerate(layer.dependencies) for before, gap in waits]
    gaps = least_heights(len(starts), dependencies, MAX_START + 1)
    for before, after, gap in dependencies:
        apart = {starts[after]: 1.0, starts[before]: -1.0} if after != before else {}
        program.at_least(apart | {pace: -length[before]}, -gap)
    for tasks in layer.lanes.values():
        for i, j in combinations(tasks, 2):
            # What the dependencies say of i and j already bounds K.
            low = max(-MAX_START, 1 - gaps[j][i])
            height = heights[i, j] = program.variable(low, min(MAX_START, gaps[i][j]), integer=True)
            program.at_least({starts[j]: 1.0, starts[i]: -1.0, height: 1.0, pace: -length[i]}, 0.0)
            program.at_least({starts[i]: 1.0, starts[j]: -1.0, height: -1.0, pace: -length[j]}, -1.0)
    return starts, heights


def order_from_starts(layer: NanoLayer, starts: Sequence[float], heights: Mapping[tuple[int, int], int]) -> Rounds:
    """The order that starts (in periods) and K per pair of a lane stand for.

    Whole periods of a start are the lag; i comes before j in a round if K, counted in rounds, is 0. Of two tasks that
    take no time K says nothing: they follow the dependencies.
    """
    lags = tuple(math.floor(start + ROUNDING) for start in starts)
    before: dict[int, set[int]] = {i: set() for i in sorted(range(len(starts)), key=lambda i: starts[i] - lags[i])}
    for (i, j), height in heights.items():
        if layer.seconds[i] or layer.seconds[j]:
            first, second = (i, j) if lags[j] - lags[i] + height <= 0 else (j, i)
            before[second].add(first)
    for j, waits in enumerate(layer.dependencies):
        before[j].update(i for i, gap in waits if lags[j] - lags[i] + gap <= 0 and i != j)
    place = {i: at for at, i in enumerate(TopologicalSorter(before).static_order())}
    order = {lane: tuple(sorted(tasks, key=place.__getitem__)) for lane, tasks in layer.lanes.items()}
    return Rounds(layer, order, lags)
