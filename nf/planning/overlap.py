"""What a plan does while its streams run at the same time: time and energy at steady state, event by event.

Here a share is not fixed for the length of a nano-operation, as in shares.py. A stream has its SMs (a partition, or all
of them shared), and a nano-operation is as fast as what runs beside it at that moment lets it be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nf.planning.interference import CurvePoint
from nf.planning.nano_layer import COMPUTE, CostOf
from nf.planning.profile import Cost, PowerLimit, Sms
from nf.planning.rounds import Rounds

ROUNDS = 24  # simulated; the first half is for settling
LEAST_SPEED = 0.05  # a compute-bound operation never stops entirely


@dataclass(frozen=True)
class Arrangement:
    """How the streams divide the GPU.

    Args:
        name: shown to users: "co-resident", "16 SMs for memory", …
        sms: per lane.
        points: per lane but "compute": what happens while it overlaps compute-bound operations.
    """

    name: str
    sms: Mapping[str, Sms]
    points: Mapping[str, CurvePoint]

    def speeds(self, running: Sequence[str]) -> dict[str, float]:
        """Performance of the lanes that run now, over what they have alone on their SMs."""
        if COMPUTE not in running:
            return dict.fromkeys(running, 1.0)
        others = [lane for lane in running if lane != COMPUTE]
        speeds = {lane: self.points[lane].speed_in_partition for lane in others}
        lost = sum(1 - self.points[lane].kept_in_partition for lane in others)
        return speeds | {COMPUTE: max(LEAST_SPEED, 1 - lost)}

    def watts(self, running: Mapping[str, float], speeds: Mapping[str, float], idle: float) -> float:
        """Power of the card now; ``running`` is watts per lane alone. As measured if just that pair was."""
        others = [lane for lane in running if lane != COMPUTE]
        if COMPUTE in running and len(others) == 1 and not math.isnan(self.points[others[0]].watts):
            return self.points[others[0]].watts
        return idle + sum((watts - idle) * speeds[lane] for lane, watts in running.items())


@dataclass(frozen=True, slots=True)
class Steady:
    """Of one layer at steady state: seconds, and joules, static power included (NaN where unknown)."""

    seconds: float
    joules: float


def replay(rounds: Rounds, arrangement: Arrangement, cost_of: CostOf, power: PowerLimit | None) -> Steady:
    """Run the rounds of a plan, every nano-operation as early as it can, and look at the steady state.

    A power limit stretches the time until what is drawn beyond static power fits.
    """
    costs = [cost_of(task.operation, task.rows, arrangement.sms[task.lane]) for task in rounds.layer.tasks]
    seconds, joules = _Replay(rounds, arrangement, costs, power.idle_watts if power else 0.0).run()
    if power is None or math.isnan(joules):
        return Steady(seconds, joules)
    dynamic = joules - power.idle_watts * seconds
    stretched = max(seconds, dynamic / power.dynamic_watts)
    return Steady(stretched, dynamic + power.idle_watts * stretched)


class _Replay:
    def __init__(self, rounds: Rounds, arrangement: Arrangement, costs: Sequence[Cost], idle_watts: float) -> None:
        self.rounds, self.arrangement, self.costs, self.idle_watts = rounds, arrangement, costs, idle_watts
        self.waits: list[list[tuple[int, int]]] = [[] for _ in costs]  # per task: (task, rounds before)
        for before, after, height in rounds.waits:
            self.waits[after].append((before, height))
        self.next = dict.fromkeys(rounds.order, 0)  # per lane, counted over all rounds
        self.done = [-1] * len(costs)  # per task, the last round it has run in
        self.left: dict[str, float] = {}  # seconds of work, per lane that runs

    def run(self) -> tuple[float, float]:
        """Mean seconds and joules per round of the second half."""
        time = energy = 0.0
        half: tuple[float, float] | None = None
        count = sum(len(order) for order in self.rounds.order.values())
        while (ended := sum(self.next.values())) < ROUNDS * count:
            if half is None and ended >= ROUNDS // 2 * count:
                half = time, energy
            self.start()
            if not self.left:
                raise ValueError("tasks wait for each other within a round")
            speeds = self.arrangement.speeds(list(self.left))
            step = min(left / speeds[lane] for lane, left in self.left.items())
            if step > 0:
                watts = {lane: self.watts(lane) for lane in self.left}
                energy += step * self.arrangement.watts(watts, speeds, self.idle_watts)
                time += step
            self.advance(step, speeds)
        assert half is not None
        return (time - half[0]) / (ROUNDS - ROUNDS // 2), (energy - half[1]) / (ROUNDS - ROUNDS // 2)

    def head(self, lane: str) -> tuple[int, int]:
        """Task and round of what the lane runs now or next."""
        order = self.rounds.order[lane]
        return order[self.next[lane] % len(order)], self.next[lane] // len(order)

    def start(self) -> None:
        for lane in self.rounds.order:
            task, round_ = self.head(lane)
            if lane not in self.left and all(
                self.done[before] >= round_ - height for before, height in self.waits[task]
            ):
                self.left[lane] = self.costs[task].seconds

    def advance(self, step: float, speeds: Mapping[str, float]) -> None:
        for lane in list(self.left):
            self.left[lane] -= step * speeds[lane]
            if self.left[lane] <= 1e-12:
                task, round_ = self.head(lane)
                self.done[task] = round_
                self.next[lane] += 1
                del self.left[lane]

    def watts(self, lane: str) -> float:
        cost = self.costs[self.head(lane)[0]]
        return cost.joules / cost.seconds if cost.seconds else self.idle_watts
