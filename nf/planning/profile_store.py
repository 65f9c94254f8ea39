"""What was measured of a model's nano-operations, as plain data: one small JSON file per GPU, driver and kernels.

Two kinds of points: a nano-operation alone (``Solo``), over batch sizes and SM counts, and two nano-operations of
different resource classes at the same time (``CoRun``). A profile may be incomplete: a measurement that was interrupted
goes on where it stopped (``missing``), and what lies between measured points is interpolated.

Rows are counted as the operation counts them: decode rows for decode attention, prefill rows for prefill attention, all
rows of the nano-batch for the others. Times are seconds, energies joules of the whole card, static power included.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from nf.errors import InputError, shown

FORMAT_VERSION = 1
ROW_STEP = 128  # rows between measured batch sizes: one GEMM tile
SM_STEP = 8  # SMs between partitions that the hardware can give

Sms = int | Literal["all"]
"""SMs of a partition, or "all": the whole GPU, shared with whatever else runs."""


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What measurements are valid for; they name the file."""

    gpu: str
    driver: str
    kernels: str  # version or digest of the kernel sources

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
class Load:
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

    first: Load
    second: Load
    watts: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run of a nano-operation that has the GPU, or its partition, to itself."""

    seconds: float
    joules: float


NOTHING = Cost(0.0, 0.0)
SoloKey = tuple[str, int, Sms, int]


@dataclass(slots=True)
class Profile:
    """The measurements of one model shape on one GPU.

    Args:
        model: name of the shape, tensor parallel size included where it is not 1.
        gpu_sms: SMs of the GPU.
        idle_watts, cap_watts: static power and power limit of the card; None where unknown.
    """

    key: ProfileKey
    model: str
    gpu_sms: int
    idle_watts: float | None = None
    cap_watts: float | None = None
    solos: dict[SoloKey, Solo] = field(default_factory=dict)
    co_runs: dict[tuple[SoloKey, SoloKey], CoRun] = field(default_factory=dict)

    def add(self, point: Solo | CoRun) -> None:
        """Take a point in; one that was measured before is replaced."""
        if isinstance(point, Solo):
            _check_positive(point.rows, point.seconds)
            self.solos[_key(point)] = point
        else:
            for load in (point.first, point.second):
                _check_positive(load.rows, load.seconds)
            self.co_runs[_key(point.first), _key(point.second)] = point

    def missing(self, wanted: Iterable[SoloKey]) -> list[SoloKey]:
        """What of ``wanted`` (operation, rows, sms, context) has not been measured, in that order."""
        return [key for key in wanted if key not in self.solos]

    def cost(self, operation: str, rows: int, sms: Sms = "all", context: int = 0) -> Cost:
        """Time and energy of ``operation`` on ``rows`` rows, interpolated between what was measured.

        Linear in rows, in context and, in speed, in SMs. Fewer rows than the smallest that was measured cost as much as
        that (a GEMM tile is whole); more cost as much per row as the largest. No rows cost nothing; no context means
        the smallest that was measured. What was never measured on a part of the SMs is assumed to slow down in
        proportion.

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

        def over_context(at_sms: Sequence[Solo]) -> float:
            by_context = _grouped(at_sms, lambda p: p.context, over_rows)
            return _interpolate(by_context, context, below="rate" if context > 0 else "flat")

        def over_rows(at_context: Sequence[Solo]) -> float:
            return _interpolate({p.rows: float(getattr(p, which)) for p in at_context}, rows, below="flat")

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
        pairs = [[[_number(v) for v in astuple(load)] for load in (p.first, p.second)] for p in self.co_runs.values()]
        return {
            "gpu_sms": self.gpu_sms,
            "idle_watts": self.idle_watts,
            "cap_watts": self.cap_watts,
            "solo": solos,
            "co_run": [[*pair, _number(point.watts)] for pair, point in zip(pairs, self.co_runs.values(), strict=True)],
        }

    @classmethod
    def from_json(cls, key: ProfileKey, model: str, data: Mapping[str, Any]) -> Profile:
        """Read what ``to_json`` wrote."""
        profile = cls(key, model, int(data["gpu_sms"]), data["idle_watts"], data["cap_watts"])
        for operation, rows in data["solo"].items():
            for count, sms, context, seconds, joules in rows:
                profile.add(Solo(operation, count, sms, context, seconds, math.nan if joules is None else joules))
        for first, second, watts in data["co_run"]:
            profile.add(CoRun(Load(*first), Load(*second), math.nan if watts is None else watts))
        return profile


def read_profile(path: Path, model: str) -> Profile:
    """The measurements of ``model`` in a profile file, whatever they were made with.

    Raises:
        InputError: there is no such file, ``save_profile`` did not write it, or it has none of ``model``.
    """
    document = _document(path)
    if document is None:
        raise InputError(str(path), "there is no such profile file")
    models = document["models"]
    if model not in models:
        raise InputError(str(path), f"has no measurements of {model}, only of {', '.join(models) or 'nothing'}")
    return _profile(path, _key_of(document), model, models[model])


def load_profile(folder: Path, key: ProfileKey, model: str) -> Profile | None:
    """The stored measurements of ``model``, None where there are none.

    Raises:
        InputError: the file is not one that ``save_profile`` wrote.
    """
    path = folder / key.file_name
    models = _models(path, key)
    return _profile(path, key, model, models[model]) if model in models else None


def save_profile(folder: Path, profile: Profile) -> Path:
    """Write ``profile`` into the file of its key beside the other models there, whole or not at all."""
    path = folder / profile.key.file_name
    models = _models(path, profile.key)
    models[profile.model] = profile.to_json()
    head = {"version": FORMAT_VERSION, "gpu": profile.key.gpu, "driver": profile.key.driver}
    document = head | {"kernels": profile.key.kernels, "models": models}
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(_compact(document))
    part.replace(path)
    return path


def _document(path: Path) -> dict[str, Any] | None:
    """A profile file, None if there is none."""
    try:
        document = json.loads(path.read_text())
        if document["version"] != FORMAT_VERSION:
            raise InputError(str(path), f"format {shown(document['version'])} is unknown; it must be {FORMAT_VERSION}")
        _key_of(document)
        return {**document, "models": dict(document["models"])}
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"cannot be read as a profile ({error})") from None


def _key_of(document: Mapping[str, Any]) -> ProfileKey:
    return ProfileKey(document["gpu"], document["driver"], document["kernels"])


def _models(path: Path, key: ProfileKey) -> dict[str, Any]:
    """Models of a profile file that must be of ``key``."""
    document = _document(path)
    if document is None:
        return {}
    if _key_of(document) != key:
        raise InputError(str(path), "the profile was measured with another GPU, driver or kernel version")
    models: dict[str, Any] = document["models"]
    return models


def _profile(path: Path, key: ProfileKey, model: str, data: Mapping[str, Any]) -> Profile:
    try:
        return Profile.from_json(key, model, data)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(str(path), f"the profile of {model} is damaged ({error})") from None


def _compact(document: dict[str, Any]) -> str:
    """JSON with a line per innermost list, so that two profiles can be compared with diff."""
    text = json.dumps(document, indent=1, allow_nan=False)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r"\s*\n\s*", " ", match[1]) + "]", text) + "\n"


def _number(value: float | str) -> float | str | None:
    """A value for JSON, which has no NaN; seven digits are more than a measurement has."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.7g}")
    return value


def _key(point: Solo | Load) -> SoloKey:
    return point.operation, point.rows, point.sms, point.context


def _check_positive(rows: int, seconds: float) -> None:
    if rows < 1 or not seconds > 0:
        raise ValueError(f"a measured point needs rows and seconds above 0, got {rows} rows and {seconds} s")


def _grouped(
    points: Sequence[Solo], by: Callable[[Solo], int], value: Callable[[Sequence[Solo]], float]
) -> dict[int, float]:
    groups: dict[int, list[Solo]] = {}
    for point in points:
        groups.setdefault(by(point), []).append(point)
    return {key: value(group) for key, group in groups.items()}


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
