"""What was measured of a model's nano-operations, as plain data, and what lies between the measured points.

Two kinds of points: a nano-operation alone (``Solo``), over batch sizes and SM counts, and two nano-operations of
different resource classes at the same time (``CoRun``). A profile may be incomplete: a measurement that was interrupted
goes on where it stopped (``missing``).

Rows are counted as the operation counts them: decode rows for decode attention, prefill rows for prefill attention, all
rows of the nano-batch for the others. Times are seconds, energies joules of the whole card, static power included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from nf.errors import InputError, shown

ROW_STEP = 128  # rows between measured batch sizes: one GEMM tile
SM_STEP = 4  # SMs between partitions that are tried; the hardware gives even numbers

Sms = int | Literal["all"]
"""SMs of a partition, or "all": the whole GPU, shared with whatever else runs."""


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What measurements are valid for; they name the file."""

    gpu: str
    driver: str
    kernels: str  # version or digest of the kernels, and of which SMs partitions have

    @property
    def file_name(self) -> str:
        """Readable, and safe as a file's name."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.gpu}-{self.driver}-{self.kernels}".lower()).strip("-.") + ".json"


@dataclass(frozen=True, slots=True)
class Solo:
    """One nano-operation alone, repeated at steady state.

    Args:
        rows: of its kind.
        sms: the partition it ran on.
        context: mean tokens of context per row where that matters (attention), else 0.
        seconds, joules: of one run; joules is NaN where the card does not tell.
    """

    operation: str
    rows: int
    sms: Sms
    context: int
    seconds: float
    joules: float


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a co-run: which nano-operation on which SMs, and the seconds of one run beside the other."""

    operation: str
    rows: int
    sms: Sms
    context: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CoRun:
    """Two nano-operations, each repeated on its own stream for as long as the other runs.

    ``first`` is the compute-bound one; ``watts`` is the mean power of the card meanwhile.
    """

    first: Side
    second: Side
    watts: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run of a nano-operation that has the GPU, or its partition, to itself."""

    seconds: float
    joules: float


@dataclass(frozen=True, slots=True)
class PowerLimit:
    """Watts the card may draw, and those it draws when idle."""

    cap_watts: float
    idle_watts: float

    @property
    def dynamic_watts(self) -> float:
        return self.cap_watts - self.idle_watts


NOTHING = Cost(0.0, 0.0)
SoloKey = tuple[str, int, Sms, int]
PairKey = tuple[SoloKey, SoloKey]
Trend = dict[tuple[str, Sms], tuple[float, ...]]
"""Of an operation on a number of SMs: what 128, 256, … rows cost, up to a factor."""


@dataclass(slots=True)
class Profile:
    """The measurements of one model shape on one GPU.

    Args:
        model: name of the shape, tensor parallel size included where it is not 1.
        gpu_sms: SMs of the GPU.
        idle_watts, cap_watts: static power and power limit of the card; None where unknown.
        trend: how time and energy go between measured rows; where it says nothing, in a straight line.
    """

    key: ProfileKey
    model: str
    gpu_sms: int
    idle_watts: float | None = None
    cap_watts: float | None = None
    solos: dict[SoloKey, Solo] = field(default_factory=dict)
    co_runs: dict[PairKey, CoRun] = field(default_factory=dict)
    trend: Trend = field(default_factory=dict)

    def add(self, point: Solo | CoRun) -> None:
        """Take a point in; one that was measured before is replaced.

        Raises:
            ValueError: it is not a measurement on this GPU.
        """
        if isinstance(point, Solo):
            self._check(point)
            _check_known(point.joules)
            self.solos[_key(point)] = point
        else:
            for side in (point.first, point.second):
                self._check(side)
            _check_known(point.watts)
            self.co_runs[_key(point.first), _key(point.second)] = point

    def _check(self, point: Solo | Side) -> None:
        if not (_is_count(point.rows) and 0 < point.seconds < math.inf):
            raise ValueError(
                f"a measured point needs rows and seconds above 0, got {point.rows} rows and {point.seconds} s"
            )
        if point.sms != "all" and not (_is_count(point.sms) and point.sms <= self.gpu_sms):
            raise ValueError(f'a point has 1 to {self.gpu_sms} SMs or "all", got {shown(point.sms)}')
        if point.context != 0 and not _is_count(point.context):
            raise ValueError(f"a context is a number of tokens, got {shown(point.context)}")

    @property
    def power_limit(self) -> PowerLimit | None:
        """Of the card; None where it is not known."""
        if self.cap_watts is None or self.idle_watts is None:
            return None
        return PowerLimit(self.cap_watts, self.idle_watts)

    def missing(self, wanted: Iterable[SoloKey | PairKey]) -> list[SoloKey | PairKey]:
        """What of ``wanted``, (operation, rows, sms, context) or two such, has not been measured, in that order."""
        return [key for key in wanted if key not in (self.co_runs if len(key) == 2 else self.solos)]

    def cost(self, operation: str, rows: int, sms: Sms = "all", context: int = 0) -> Cost:
        """Time and energy of ``operation`` on ``rows`` rows, interpolated between what was measured.

        In rows along the trend or else linear; linear in context and, in speed, in SMs. Fewer rows than the smallest
        that was measured cost as much as that (a GEMM tile is whole), but attention as much per row; more cost as much
        per row as the largest. No rows cost nothing; no context means the smallest that was measured. What was never
        measured on a part of the SMs is assumed to slow down in proportion.

        Raises:
            InputError: ``operation`` was not measured at all.
        """
        if rows <= 0:
            return NOTHING
        if measured := self.solos.get((operation, rows, "all" if sms == self.gpu_sms else sms, context)):
            return Cost(measured.seconds, measured.joules)
        points = [point for point in self.solos.values() if point.operation == operation]
        if not points:
            raise InputError("profile", f"{shown(operation)} of {self.model} was not measured on {self.key.gpu}")
        return Cost(*(self._at(points, rows, sms, context, which) for which in ("seconds", "joules")))

    def _at(self, points: Sequence[Solo], rows: int, sms: Sms, context: int, which: str) -> float:
        """Interpolate over SMs first, then context, then rows."""
        ends: Ends = "rate" if context > 0 else "flat"

        def over_context(at_sms: Sequence[Solo]) -> float:
            by_context = _grouped(at_sms, lambda p: p.context, over_rows)
            return _interpolate(by_context, context, below=ends)

        def over_rows(at_context: Sequence[Solo]) -> float:
            values = {p.rows: float(getattr(p, which)) for p in at_context}
            trend = self.trend.get((at_context[0].operation, at_context[0].sms), ())
            most = len(trend) * ROW_STEP
            if not min(values) < rows < max(values) <= most:
                return _interpolate(values, rows, below=ends)
            factors = {count: value / _step(trend, count) for count, value in values.items()}
            return _step(trend, rows) * _interpolate(factors, rows, below=ends)

        by_sms = _grouped(points, lambda p: self.gpu_sms if p.sms == "all" else p.sms, over_context)
        target = self.gpu_sms if sms == "all" else sms
        if which == "joules":
            return _interpolate(by_sms, target, below="flat", above="flat")
        speeds = {count: 1 / seconds for count, seconds in by_sms.items()}
        return 1 / _interpolate(speeds, target, below="rate", above="flat")

    def to_json(self) -> dict[str, Any]:
        """The points as rows of numbers, by operation."""
        solos: dict[str, list[list[Any]]] = {}
        for point in self.solos.values():
            solos.setdefault(point.operation, []).append([_number(value) for value in astuple(point)[1:]])
        pairs = [[[_number(v) for v in astuple(side)] for side in (p.first, p.second)] for p in self.co_runs.values()]
        trend = [[*key, *(round(step, 3) for step in steps)] for key, steps in self.trend.items()]
        return {
            "gpu_sms": self.gpu_sms,
            "idle_watts": self.idle_watts,
            "cap_watts": self.cap_watts,
            "solo": solos,
            "co_run": [[*pair, _number(point.watts)] for pair, point in zip(pairs, self.co_runs.values(), strict=True)],
            **({"trend": trend} if trend else {}),
        }

    @classmethod
    def from_json(cls, key: ProfileKey, model: str, data: Mapping[str, Any]) -> Profile:
        """Read what ``to_json`` wrote.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it did not.
        """
        sms, idle, cap = data["gpu_sms"], data["idle_watts"], data["cap_watts"]
        if not _is_count(sms):
            raise ValueError(f"gpu_sms must be a number of SMs, not {shown(sms)}")
        if None not in (idle, cap) and not 0 <= idle < cap < math.inf:
            raise ValueError(f"idle_watts must be below cap_watts, got {shown(idle)} and {shown(cap)}")
        profile = cls(key, model, sms, idle, cap)
        for operation, rows in data["solo"].items():
            for count, sms, context, seconds, joules in rows:
                profile.add(Solo(operation, count, sms, context, seconds, math.nan if joules is None else joules))
        for first, second, watts in data["co_run"]:
            profile.add(CoRun(Side(*first), Side(*second), math.nan if watts is None else watts))
        for operation, sms, *steps in data.get("trend", ()):
            if not all(0 < step < math.inf for step in steps):
                raise ValueError(f"the trend of {shown(operation)} must be above 0, got {shown(steps)}")
            profile.trend[operation, sms] = tuple(steps)
        return profile


def _number(value: float | str) -> float | str | None:
    """A value for JSON, which has no NaN; seven digits are more than a measurement has."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.7g}")
    return value


def _key(point: Solo | Side) -> SoloKey:
    return point.operation, point.rows, point.sms, point.context


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _check_known(value: float) -> None:
    if not (math.isnan(value) or 0 <= value < math.inf):
        raise ValueError(f"joules and watts are at least 0 or unknown, got {value}")


def _grouped(
    points: Sequence[Solo], by: Callable[[Solo], int], value: Callable[[Sequence[Solo]], float]
) -> dict[int, float]:
    groups: dict[int, list[Solo]] = {}
    for point in points:
        groups.setdefault(by(point), []).append(point)
    return {key: value(group) for key, group in groups.items()}


def _step(trend: Sequence[float], rows: int) -> float:
    """Of so many rows; a begun step counts as a whole one."""
    return trend[-(-rows // ROW_STEP) - 1]


Ends = Literal["flat", "rate"]


def _interpolate(values: Mapping[int, float], at: int, *, below: Ends, above: Ends = "rate") -> float:
    """Piecewise linear; beyond the ends constant ("flat") or in proportion to the end ("rate")."""
    known = sorted(values)
    if at <= known[0]:
        return values[known[0]] * (at / known[0] if below == "rate" and known[0] else 1.0)
    if at >= known[-1]:
        return values[known[-1]] * (at / known[-1] if above == "rate" and known[-1] else 1.0)
    low, high = next((low, high) for low, high in pairwise(known) if at <= high)
    return values[low] + (values[high] - values[low]) * (at - low) / (high - low)
