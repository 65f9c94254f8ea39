"""Measured steps in a file: kept as they come in, so that an interrupted search goes on where it stopped, and a search
that was measured on one machine can be told, stored and predicted for on another, which needs no GPU.

The file is one JSON object: what was measured on, and for each plan and load the measurements in their order.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.errors import InputError, NfError
from nf.files import write_whole
from nf.graphs.pipeline_plan import PipelinePlan

FORMAT_VERSION = 1

Steps = dict[tuple[PipelinePlan, Load], list[Measurement]]


class StepBench(Protocol):
    """Measures whole steps at steady state."""

    def measure(self, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        """Of each load, with the graphs of ``plan`` captured once."""
        ...


@dataclass(frozen=True, slots=True)
class MeasuredOn:
    """What measured steps are valid for.

    Args:
        model: name of its shape.
        kv_tokens: that its KV cache holds there, by which loads are shortened.
    """

    model: str
    gpu: str
    gpu_sms: int
    driver: str
    kernels: str
    kv_tokens: int


class KeptSteps:
    """A ``StepBench`` that measures nothing twice: the nth time it is asked for a plan at a load it answers with the
    nth measurement of it there, which the file has or ``bench`` makes.

    Args:
        path: of the file, written whole after every measurement.
        steps: what it has.
        bench: None measures nothing.
    """

    def __init__(self, path: Path, on: MeasuredOn, steps: Steps, bench: StepBench | None = None) -> None:
        self.on = on
        self._path, self._steps, self._bench = path, steps, bench
        self._asked: Counter[tuple[PipelinePlan, Load]] = Counter()

    @property
    def plans(self) -> list[PipelinePlan]:
        """That were measured, each once."""
        return list(dict.fromkeys(plan for plan, _ in self._steps))

    def at(self, plan: PipelinePlan, loads: Sequence[Load]) -> tuple[int, ...]:
        """Numbers of the loads at which the file has measured it."""
        known = self._known(plan)
        return tuple(number for number, load in enumerate(loads) if (known, load) in self._steps)

    def measure(self, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        """See ``StepBench``.

        Raises:
            NfError: the file has too few measurements of the plan, and there is nothing to make them with.
        """
        known, own = self._known(plan), plain(plan)
        missing = [load for load in loads if len(self._steps.get((known, load), ())) <= self._asked[own, load]]
        if missing:
            if self._bench is None:
                often = "only once" if self._asked[own, missing[0]] else "not"
                where = f"{missing[0].input_len} in, {missing[0].output_len} out"
                raise NfError(f"{plan.name} at {where} was {often} measured in {self._path}")
            for load, found in zip(missing, self._bench.measure(plan, missing), strict=True):
                self._steps.setdefault((known, load), []).append(found)
            self._save()
        times = [self._asked[own, load] for load in loads]
        self._asked.update((own, load) for load in loads)
        return [self._steps[known, load][time] for load, time in zip(loads, times, strict=True)]

    def _known(self, plan: PipelinePlan) -> PipelinePlan:
        """The plan under the name that it has in the file."""
        return next((other for other in self.plans if plain(other) == plain(plan)), plan)

    def _save(self) -> None:
        steps = [
            {"plan": json.loads(plan.to_json()), "load": asdict(load), "measured": [_pair(m) for m in measured]}
            for (plan, load), measured in self._steps.items()
        ]
        document = {"version": FORMAT_VERSION, "on": asdict(self.on), "steps": steps}
        write_whole(self._path, json.dumps(document, allow_nan=False) + "\n")


def open_steps(path: Path, on: MeasuredOn, bench: StepBench) -> KeptSteps:
    """The file to go on with, or a new one; what it does not have is measured by ``bench``.

    Raises:
        InputError: it cannot be read, or was measured on something else.
    """
    if not path.exists():
        return KeptSteps(path, on, {}, bench)
    before, steps = _read(path, on.model)
    if before != on:
        differ = ", ".join(name for name, value in asdict(on).items() if asdict(before)[name] != value)
        raise InputError(str(path), f"has steps that were measured with another {differ}; name another file")
    return KeptSteps(path, on, steps, bench)


def read_steps(path: Path, model: str) -> KeptSteps:
    """What was measured of a model's shape.

    Raises:
        InputError: there is no such file, ``KeptSteps`` did not write it, or it is of another model.
    """
    return KeptSteps(path, *_read(path, model))


def _read(path: Path, model: str) -> tuple[MeasuredOn, Steps]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != FORMAT_VERSION:
            raise ValueError(f"its format is not {FORMAT_VERSION}")
        on, steps = MeasuredOn(**document["on"]), _steps(document["steps"])
    except FileNotFoundError:
        raise InputError(str(path), "there is no such file of measured steps") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, NfError) as error:
        raise InputError(str(path), f"cannot be read as measured steps ({error})") from None
    if on.model != model:
        raise InputError(str(path), f"has steps of {on.model}, not of {model}")
    return on, steps


def _steps(steps: Iterable[dict[str, Any]]) -> Steps:
    return {
        (PipelinePlan.from_json(json.dumps(step["plan"])), Load(**step["load"])): [
            Measurement(float(seconds), math.nan if joules is None else float(joules))
            for seconds, joules in step["measured"]
        ]
        for step in steps
    }


def plain(plan: PipelinePlan) -> PipelinePlan:
    """What of a plan decides how fast it is."""
    return replace(plan, name="", model=None, gpu=None, loads=())


def _pair(found: Measurement) -> list[float | None]:
    return [found.seconds, None if math.isnan(found.joules) else found.joules]
