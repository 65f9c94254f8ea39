"""How much two nano-operations slow each other down: R → P curves (NanoFlow, arXiv 2408.12757, section 4.1).

While a compute-bound operation and another one overlap, the first keeps a part of the performance it has alone (R) and
the second reaches a part of its own (P). A point of the curve is one way to divide the GPU: a partition of so many SMs
for the second operation, or none ("all"), where the scheduler of the hardware divides it. Curves are measured pair by
pair; where three operations overlap, what they take from the compute-bound one adds up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from types import MappingProxyType

from nf.errors import InputError
from nf.planning.profile import CoRun, Profile, Side, Sms

WATTS_TOLERANCE = 1.02  # powers that differ by less are the same


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One way to divide the GPU between a compute-bound operation and another.

    Args:
        sms: of the second operation.
        kept: R, performance of the compute-bound operation beside the other over its performance alone on the GPU.
        speed: P, the same of the second operation.
        kept_in_partition, speed_in_partition: the same over their performance alone on *their* SMs, so that only
            what they disturb each other (memory, power) is left; equal to R and P where there is no partition.
        watts: of the card meanwhile; NaN where unknown.
        spread: standard deviation of R and P over the pairs that were measured, the larger of the two.
    """

    sms: Sms
    kept: float
    speed: float
    kept_in_partition: float
    speed_in_partition: float
    watts: float = float("nan")
    spread: float = 0.0

    @property
    def share(self) -> float:
        """What the second operation takes of the GPU: 1 − R."""
        return 1.0 - self.kept


Curve = tuple[CurvePoint, ...]
"""By growing share."""


def curve(profile: Profile, first: Iterable[str], second: Iterable[str], *, dominated: bool = False) -> Curve:
    """The R → P curve between two groups of operations: the mean over their pairs in ``profile``, by SM count.

    Args:
        first: names of compute-bound operations.
        second: names of operations of another resource class.
        dominated: keep points that another one beats in R, P and power.
    """
    firsts, seconds = set(first), set(second)
    groups: dict[Sms, list[CoRun]] = {}
    for pair in profile.co_runs.values():
        if pair.first.operation in firsts and pair.second.operation in seconds:
            groups.setdefault(pair.second.sms, []).append(pair)
    points = [_mean(profile, sms, pairs) for sms, pairs in groups.items()]
    return without_dominated(points) if not dominated else _by_share(points)


def without_dominated(points: Sequence[CurvePoint]) -> Curve:
    """Only points that no other one beats or equals in R, in P and in power."""
    left: list[CurvePoint] = []
    for point in sorted(points, key=lambda p: (-p.kept, -p.speed)):
        if not any(_beats(other, point) for other in left):
            left.append(point)
    return _by_share([p for p in left if not any(_beats(other, p) for other in left if other is not p)])


def _beats(a: CurvePoint, b: CurvePoint) -> bool:
    """An unknown power (NaN) decides nothing."""
    return a.kept >= b.kept and a.speed >= b.speed and not a.watts > b.watts * WATTS_TOLERANCE


def _by_share(points: Iterable[CurvePoint]) -> Curve:
    return tuple(sorted(points, key=lambda point: (point.share, point.speed)))


def _mean(profile: Profile, sms: Sms, pairs: Sequence[CoRun]) -> CurvePoint:
    """Long GEMMs weigh more than short ones, as they are what another operation overlaps for most of its time."""
    weights = [_alone(profile, pair.first, "all") for pair in pairs]

    def mean(values: Iterable[float]) -> float:
        return min(1.0, fmean(values, weights))

    kept = [_relative(profile, pair.first, "all") for pair in pairs]
    speed = [_relative(profile, pair.second, "all") for pair in pairs]
    return CurvePoint(
        sms=sms,
        kept=mean(kept),
        speed=mean(speed),
        kept_in_partition=mean(_relative(profile, pair.first, pair.first.sms) for pair in pairs),
        speed_in_partition=mean(_relative(profile, pair.second, pair.second.sms) for pair in pairs),
        watts=fmean((pair.watts for pair in pairs), weights),
        spread=max(pstdev(kept), pstdev(speed)),
    )


def _relative(profile: Profile, side: Side, sms: Sms) -> float:
    """Performance beside the other operation over that alone on ``sms``."""
    return _alone(profile, side, sms) / side.seconds


def _alone(profile: Profile, side: Side, sms: Sms) -> float:
    """Seconds of the same nano-operation on ``sms`` with nothing beside it."""
    return profile.cost(side.operation, side.rows, sms, side.context).seconds


def published(points: Mapping[float, float]) -> Curve:
    """A curve given as share of the GPU → P, as NanoFlow's authors give theirs."""
    for share, speed in points.items():
        if not (0 < share <= 1 and 0 < speed <= 1):
            raise InputError(
                "interference", f"shares and performances are above 0 and at most 1, got {share} → {speed}"
            )
    return _by_share(CurvePoint("all", 1 - r, p, 1 - r, p) for r, p in points.items())


A100_PUBLISHED: Mapping[str, Curve] = MappingProxyType(
    {
        "memory": published(
            {0.1: 0.25, 0.2: 0.4, 0.3: 0.5, 0.4: 0.6, 0.5: 0.7, 0.6: 0.8, 0.7: 0.85, 0.8: 0.9, 0.9: 0.95}
        ),
        "network": published({0.1: 0.4, 0.2: 0.6, 0.3: 0.7, 0.4: 0.8, 0.5: 0.9}),
    }
)
"""Decode attention and collectives beside a GEMM on an A100, as used by the search of NanoFlow's authors."""
