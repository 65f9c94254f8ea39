"""Stage II of the search as in the paper: a share of the GPU for every nano-operation.

NanoFlow, arXiv 2408.12757, section 4.2.2: the order is given; every nano-operation gets one of the shares R at which
it was measured (a one-hot choice) and takes its time alone divided by P(R); at no time do the shares of what runs sum
up to more than 1. Beyond the paper, the program is about the steady state and not about three layers (order.py says how
it stays linear), and the power of the card is a further resource: the energy of a layer must not exceed what the power
limit allows in a period.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from nf.errors import InputError
from nf.planning.admission import improve_shares
from nf.planning.integer_program import IntegerProgram
from nf.planning.interference import Curve
from nf.planning.nano_layer import COMPUTE, Task
from nf.planning.profile import PowerLimit
from nf.planning.rounds import Rounds, critical_circle, least_heights
from nf.planning.structure import Structure

MAX_START = 6  # periods
TENTHS = tuple(r / 10 for r in range(1, 11))
Choices = Mapping[float, float]
"""Share R → performance P."""


@dataclass(frozen=True, slots=True)
class Shares:
    """A share per task and what follows from it.

    Args:
        rounds: tasks and their order.
        shares: of the GPU, per task of the layer.
        seconds: per task, at its share.
        starts: per task, seconds in a steady round.
        period: seconds per layer at steady state.
        bound: seconds; no choice of shares has a shorter period, given the order.
        joules: of a layer; NaN where the energy of an operation is unknown.
    """

    rounds: Rounds
    shares: tuple[float, ...]
    seconds: tuple[float, ...]
    starts: tuple[float, ...]
    period: float
    bound: float
    joules: float

    @property
    def gap(self) -> float:
        """How much shorter the period could at most be, relative."""
        return 1 - self.bound / self.period


def best_shares(
    rounds: Rounds,
    curves: Mapping[str, Curve],
    *,
    power: PowerLimit | None = None,
    seconds: float = 60.0,
) -> Shares:
    """The shares with the shortest period.

    Args:
        rounds: tasks and order, from Stage I.
        curves: lane → R → P beside compute-bound operations, for every lane but "compute".
        power: None leaves energy out.
        seconds: to search for.

    Raises:
        InputError: a lane has no curve.
    """
    for lane in rounds.order:
        if lane != COMPUTE and not curves.get(lane):
            raise InputError("curves", f"the lane {lane} has no R → P curve")
    return _ShareProgram(rounds, curves, power).solve(seconds)


def share_candidates(
    structures: Sequence[Structure],
    curves: Mapping[str, Curve],
    *,
    power: PowerLimit | None = None,
    seconds: float = 60.0,
    count: int = 3,
) -> tuple[Shares, ...]:
    """A share for every nano-operation of the most promising ``structures``, shortest period first.

    All of them are given shares by local search; the ``count`` best go through the integer program.
    """
    quick = [best_shares(structure.rounds, curves, power=power, seconds=0.0) for structure in structures]
    ranked = sorted(range(len(structures)), key=lambda i: quick[i].period)[:count]
    found = [best_shares(structures[i].rounds, curves, power=power, seconds=seconds / len(ranked)) for i in ranked]
    return tuple(sorted(found, key=lambda shares: shares.period))


def _choices(task: Task, curves: Mapping[str, Curve]) -> Choices:
    """A GEMM's performance is its share, by definition of R; the others have theirs from the curve."""
    if task.cost.seconds == 0:
        return {0.0: 1.0}
    if task.lane == COMPUTE:
        kept = {round(point.kept, 6) for curve in curves.values() for point in curve if 0 < point.kept < 1}
        return {share: share for share in sorted({*TENTHS, *kept})}
    return {round(point.share, 6): point.speed for point in curves[task.lane] if 0 < point.share < 1} | {1.0: 1.0}


class _ShareProgram:
    def __init__(self, rounds: Rounds, curves: Mapping[str, Curve], power: PowerLimit | None) -> None:
        self.rounds, self.power = rounds, power
        self.tasks = rounds.layer.tasks
        self.choices = [_choices(task, curves) for task in self.tasks]
        self.unit = rounds.period()  # seconds; the pace is 1 if nothing interferes
        self.program = program = IntegerProgram()
        self.pace = program.variable(0.0, 1.0, gain=1.0)
        self.starts = [program.variable(0.0, MAX_START) for _ in self.tasks]
        # chosen: one-hot; paced: chosen · pace, which makes (seconds at that share) · pace linear.
        self.chosen = [{r: program.variable(0, 1, integer=True) for r in c} for c in self.choices]
        self.paced = [{r: program.variable(0.0, 1.0) for r in c} for c in self.choices]
        self.lengths = [
            {self.paced[i][r]: task.cost.seconds / self.unit / p for r, p in self.choices[i].items()}
            for i, task in enumerate(self.tasks)
        ]
        self.pairs: dict[tuple[int, int], tuple[int, int]] = {}  # tasks of two lanes → (may overlap, K)
        self.least = least_heights(len(self.tasks), rounds.edges, MAX_START + 1)  # what is known of K beforehand
        self._choose_one()
        self._keep_order()
        self._limit_resources()
        self._limit_overlaps()

    def _choose_one(self) -> None:
        for chosen, paced in zip(self.chosen, self.paced, strict=True):
            self.program.equal(dict.fromkeys(chosen.values(), 1.0), 1.0)
            self.program.equal(dict.fromkeys(paced.values(), 1.0) | {self.pace: -1.0}, 0.0)
            for r in chosen:
                self.program.at_least({chosen[r]: 1.0, paced[r]: -1.0}, 0.0)

    def _keep_order(self) -> None:
        for before, after, height in self.rounds.edges:
            terms = {self.starts[after]: 1.0, self.starts[before]: -1.0} if before != after else {}
            self.program.at_least(terms | _negative(self.lengths[before]), -height)

    def _height(self, i: int, j: int) -> int:
        """A new variable K, as in order.py."""
        low, high = max(-MAX_START, 1 - self.least[j][i]), min(MAX_START, self.least[i][j])
        return self.program.variable(low, high, integer=True)

    def _clear(self, i: int, j: int, height: int, overlap: int) -> None:
        """Task j runs after i and before the i of the next round, K rounds apart, unless they may overlap."""
        ij = {self.starts[j]: 1.0, self.starts[i]: -1.0, height: 1.0}
        self.program.at_least(ij | {overlap: 1.0} | _negative(self.lengths[i]), 0.0)
        self.program.at_least(_negative(ij) | {overlap: 1.0} | _negative(self.lengths[j]), -1.0)

    def _limit_resources(self) -> None:
        """Within a period, no lane is busy for longer, no more than the whole GPU is used, no more than the power.

        The first two follow from the order and the overlaps, but give the solver its bound.
        """
        area: dict[int, float] = {}
        energy: dict[int, float] = {}
        for i, task in enumerate(self.tasks):
            for r, length in zip(self.choices[i], self.lengths[i].values(), strict=True):
                area[self.paced[i][r]] = -r * length
                if self.power and not math.isnan(task.cost.joules):
                    dynamic = task.cost.joules - self.power.idle_watts * task.cost.seconds
                    energy[self.paced[i][r]] = -dynamic / (self.power.dynamic_watts * self.unit)
        for row in (area, energy):
            self.program.at_least(row, -1.0)
        for tasks in self.rounds.order.values():
            self.program.at_least({x: -length for i in tasks for x, length in self.lengths[i].items()}, -1.0)

    def _limit_overlaps(self) -> None:
        """Two tasks of different lanes either keep clear of each other in every round, or share the GPU."""
        lanes = [[i for i in tasks if self.tasks[i].cost.seconds > 0] for tasks in self.rounds.order.values()]
        program = self.program
        for one, other in combinations(lanes, 2):
            for i, j in product(one, other):
                apart = self.least[i][j] + self.least[j][i] == 1  # the order keeps them so
                overlap = program.variable(0, 0 if apart else 1, integer=True)
                height = self._height(i, j)
                self.pairs[i, j] = overlap, height
                self._clear(i, j, height, overlap)
                program.at_least(self._used(i, j) | {overlap: -1.0}, -2.0)
        for three in combinations(lanes, 3):
            for i, j, k in product(*three):
                overlaps = dict.fromkeys((self.pairs[pair][0] for pair in ((i, j), (j, k), (i, k))), -1.0)
                program.at_least(self._used(i, j, k) | overlaps, -4.0)

    def _used(self, *tasks: int) -> dict[int, float]:
        return {variable: -r for i in tasks for r, variable in self.chosen[i].items()}

    def solve(self, seconds: float) -> Shares:
        guess = self._guess(max(0.5, seconds / 5))
        solution = self.program.solve(seconds, guess)
        values = guess
        if solution.values is not None and solution.values[self.pace] >= guess[self.pace]:
            values = list(solution.values)
        shares = tuple(max(c, key=lambda r: values[c[r]]) for c in self.chosen)
        lengths = tuple(
            task.cost.seconds / choices[share]
            for task, choices, share in zip(self.tasks, self.choices, shares, strict=True)
        )
        period = self.unit / values[self.pace]
        joules = math.fsum(task.cost.joules for task in self.tasks)
        if self.power:
            alone = math.fsum(task.cost.seconds for task in self.tasks)
            joules += self.power.idle_watts * (period - alone)
        bound = self.unit / solution.bound if 0 < solution.bound < math.inf else self.unit
        starts = [values[start] for start in self.starts]
        begun = tuple((start - min(starts)) * period for start in starts)
        return Shares(self.rounds, shares, lengths, begun, period, min(bound, period), joules)

    def _guess(self, seconds: float) -> list[float]:
        """The best solution that gives all tasks of a lane the same share, improved task by task."""
        lanes = {lane: [i for i in own if self.tasks[i].cost.seconds > 0] for lane, own in self.rounds.order.items()}
        busy = {lane: own[0] for lane, own in lanes.items() if own}
        options = [list(self.choices[i]) for i in busy.values()]
        best = math.inf, list[float]()
        for combination in (c for c in product(*options) if sum(c) <= 1 + 1e-9):
            by_lane = dict(zip(busy, combination, strict=True))
            shares = [by_lane.get(t.lane, 0.0) if t.cost.seconds > 0 else 0.0 for t in self.tasks]
            lengths = [t.cost.seconds / c[r] for t, c, r in zip(self.tasks, self.choices, shares, strict=True)]
            period = max(critical_circle(lengths, self.rounds.edges)[0], self._power_period())
            if period < best[0]:
                best = period, shares
        if not best[1]:
            raise InputError("curves", "no measured shares of all lanes fit beside each other")
        period, improved, starts = improve_shares(
            self.rounds, self.choices, best[1], least=self._power_period(), seconds=seconds
        )
        if period < best[0]:
            values = self._values(period, improved, starts)
            if self.program.holds(values):
                return values
        return self._values(*best)

    def _power_period(self) -> float:
        if self.power is None:
            return 0.0
        dynamic = [t.cost.joules - self.power.idle_watts * t.cost.seconds for t in self.tasks]
        return math.fsum(d for d in dynamic if not math.isnan(d)) / self.power.dynamic_watts

    def _values(self, period: float, shares: Sequence[float], starts: Sequence[float] | None = None) -> list[float]:
        """All variables of the program for given shares; without ``starts``, everything starts as early as it can."""
        times = [start / period for start in starts] if starts else [0.0] * len(shares)
        period *= 1 + 1e-7  # lengths a little shorter in periods, so that rounding breaks no row
        pace = min(1.0, self.unit / period)
        lengths = [t.cost.seconds / c[r] / period for t, c, r in zip(self.tasks, self.choices, shares, strict=True)]
        for _ in lengths:
            for before, after, height in self.rounds.edges:
                times[after] = max(times[after], times[before] + lengths[before] - height)
        values = [0.0] * len(self.program.gains)
        values[self.pace] = pace
        for i, share in enumerate(shares):
            values[self.starts[i]] = times[i]
            values[self.chosen[i][share]] = 1.0
            values[self.paced[i][share]] = pace
        for (i, j), (overlap, height) in self.pairs.items():
            apart = times[j] - times[i]
            clear = math.ceil(lengths[i] - apart - 1e-9)
            values[overlap] = float(clear > 1 - lengths[j] - apart + 1e-9)
            values[height] = max(clear - values[overlap], self.program.lower[height])
        return values


def _negative(terms: Mapping[int, float]) -> dict[int, float]:
    return {variable: -value for variable, value in terms.items()}
