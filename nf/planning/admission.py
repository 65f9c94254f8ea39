"""A quick way to good shares: first come, first served, and one share changed at a time.

It gives the integer program of shares.py a solution to begin with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

from nf.planning.rounds import Rounds

ROUNDS = 12  # played; a steady round is usually reached after three or four
SAME = 1e-9  # relative
SLACK = 1e-6  # of a period, within which two moments are the same
FULL = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Admitted:
    """Starts of all tasks in a steady round, in seconds, and the seconds from one round to the next."""

    period: float
    starts: tuple[float, ...]


def admit(rounds: Rounds, seconds: Sequence[float], shares: Sequence[float]) -> Admitted | None:
    """Start every task as soon as its lane is free, its dependencies are met and its share of the GPU is free.

    Returns:
        None if no steady round was reached.
    """
    count = len(seconds)
    waits: list[list[tuple[int, int]]] = [[] for _ in seconds]
    for before, after, height in rounds.waits:
        waits[after].append((before, height))
    lanes = list(rounds.order.values())
    place = [0] * len(lanes)  # over all rounds
    began = [[0.0] * count for _ in range(ROUNDS)]
    ended = [-1] * count  # last round that has ended
    running: list[tuple[float, int, int, int]] = []  # (end, lane, task, round)
    time = used = 0.0
    while True:
        moved = True
        while moved:  # a task that takes no time ends at once and may let others start
            moved = False
            for lane, order in enumerate(lanes):
                round_, at = divmod(place[lane], len(order))
                task = order[at]
                busy = any(item[1] == lane for item in running)
                if busy or round_ >= ROUNDS or used + shares[task] > FULL:
                    continue
                if all(ended[before] >= round_ - height for before, height in waits[task]):
                    place[lane] += 1
                    began[round_][task] = time
                    if seconds[task] > 0:
                        running.append((time + seconds[task], lane, task, round_))
                        used += shares[task]
                    else:
                        ended[task], moved = round_, True
        if not running:
            break
        time = min(item[0] for item in running)
        for item in [item for item in running if item[0] <= time * (1 + SAME)]:
            running.remove(item)
            ended[item[2]] = item[3]
            used -= shares[item[2]]
    last = ROUNDS - 2  # in the very last round lanes run out of work
    steps = [began[last][i] - began[last - 1][i] for i in range(count)]
    if max(place) < len(max(lanes, key=len)) or max(steps) - min(steps) > SLACK * max(steps):
        return None
    first = min(began[last])
    steady = Admitted(max(steps), tuple(start - first for start in began[last]))
    return steady if _lasts(rounds, steady, seconds, shares) else None


def _lasts(rounds: Rounds, steady: Admitted, seconds: Sequence[float], shares: Sequence[float]) -> bool:
    """Whether the round can go on for ever. A lane that is rounds ahead has ended when the last rounds of the others
    are played, so that these find more of the GPU free than they would in the long run."""
    period, starts = steady.period, steady.starts
    if any(
        starts[after] < starts[before] + seconds[before] - (height + SLACK) * period
        for before, after, height in rounds.edges
    ):
        return False
    spans = [span for span in zip(starts, seconds, shares, strict=True) if span[1] > 0]
    return all(
        sum(share for start, length, share in spans if (moment - start + SLACK * period) % period < length) <= FULL
        for moment, _, _ in spans  # what runs grows only there
    )


def improve_shares(
    rounds: Rounds,
    choices: Sequence[Mapping[float, float]],
    shares: Sequence[float],
    *,
    least: float,
    seconds: float,
) -> tuple[float, list[float], tuple[float, ...]]:
    """Change shares one by one, to the next smaller or larger, as long as the period gets shorter.

    Args:
        choices: share → performance, per task.
        shares: to begin with.
        least: seconds; a period that power does not allow to be shorter.
        seconds: to search for.

    Returns:
        Period (infinite if no steady round was found), shares, starts.
    """
    deadline = monotonic() + seconds
    times = [task.cost.seconds for task in rounds.layer.tasks]

    def play(candidate: Sequence[float]) -> Admitted | None:
        return admit(rounds, [t / c[r] for t, c, r in zip(times, choices, candidate, strict=True)], candidate)

    best = list(shares)
    steady = play(best)
    improved = True
    while improved and monotonic() < deadline:
        improved = False
        for i, options in enumerate(choices):
            ladder = sorted(options)
            for share in _nearest(ladder, best[i]):
                candidate = [*best[:i], share, *best[i + 1 :]]
                found = play(candidate)
                if found and (steady is None or found.period < steady.period * (1 - 1e-6)):
                    best, steady, improved = candidate, found, True
    if steady is None:
        return math.inf, best, ()
    # Under a power limit the starts spread out: all of them later in proportion keeps every order.
    stretch = max(1.0, least / steady.period)
    return steady.period * stretch, best, tuple(start * stretch for start in steady.starts)


def _nearest(ladder: Sequence[float], share: float) -> list[float]:
    """The two steps below and above."""
    at = ladder.index(share)
    return [ladder[k] for k in (at - 2, at - 1, at + 1, at + 2) if 0 <= k < len(ladder)]
