"""Which of the plans that won is for which steps: as measured at the loads, as predicted between and around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from nf.graphs.pipeline_plan import PipelinePlan
from nf.models.declaration import Model
from nf.planning.loads import made_for
from nf.planning.nano_layer import BatchShape
from nf.planning.predict import of_plan
from nf.planning.profile import Profile
from nf.planning.search import Result, Search

STEP = 1.3  # from a load of the grid to the next, in decode tokens and in keys: every step has one near
FEWEST_TOKENS = 1 / 16  # of a step, that decode
FEWEST_KEYS, MOST_KEYS = 16, 1 << 15  # that a decode token sees on average
AS_MEASURED = 1.15  # a load so near to a measured one has the plan that won there
SURE = 0.015  # relative: what is predicted to gain less gains nothing

Place = tuple[int, int]  # decode tokens, keys that each of them sees


def covering_plans(found: Search, model: Model, profile: Profile | None, kv_tokens: int) -> list[PipelinePlan]:
    """Every plan that won with the loads that it is for: those that it won, and of a grid of others those at which
    ``profile``, set right by what was measured nearby, predicts it to be the fastest of the winners and the sequential
    plan.

    Args:
        profile: None leaves the grid out; so do loads that only decode.
        kv_tokens: that the KV cache holds.
    """
    owners: dict[Place, tuple[Result, bool]] = {}  # one each: of two loads that look alike to a plan the first counts
    for load, best in zip(found.loads, found.best, strict=True):
        owners.setdefault(made_for(load), (best, load.decode_only))
    if profile is not None and not all(load.decode_only for load in found.loads):
        for place in _grid(found.loads[0].dense_batch_size, kv_tokens):
            if (best_there := _best_at(place, found, model, profile)) is not None:
                owners.setdefault(place, (best_there, False))
    places: dict[tuple[Result, bool], list[Place]] = {}
    for place, owner in owners.items():
        places.setdefault(owner, []).append(place)
    return [replace(result.candidate.plan, loads=tuple(own)) for (result, _), own in places.items()]


def _grid(size: int, kv_tokens: int) -> Iterator[Place]:
    """Loads of steps of ``size`` tokens, as many as the KV cache holds."""
    tokens = size * FEWEST_TOKENS
    while tokens < size / math.sqrt(STEP):
        keys = FEWEST_KEYS
        while keys * tokens <= kv_tokens and keys <= MOST_KEYS:
            yield max(1, round(tokens)), keys
            keys = math.ceil(keys * STEP)
        tokens *= STEP


def _best_at(place: Place, found: Search, model: Model, profile: Profile) -> Result | None:
    """None where nothing is predicted of the sequential plan."""
    apart = {n: _apart(place, made_for(load)) for n, load in enumerate(found.loads) if not load.decode_only}
    nearest = min(apart, key=lambda number: apart[number])
    if apart[nearest] <= math.log(AS_MEASURED):
        return found.best[nearest]
    tokens, keys = place
    batch = BatchShape(found.loads[0].dense_batch_size, tokens, keys, max(1, keys // 2))
    base, times = found.sequential, dict[Result, float]()
    for result in dict.fromkeys((base, *found.best)):
        if (predicted := of_plan(result.candidate.plan, model, profile, batch)) is not None:
            times[result] = predicted.seconds * _bias(result, apart)
    if base not in times:
        return None
    best = min(times, key=lambda result: times[result])
    return best if times[best] < times[base] * (1 - SURE) else base


def _bias(result: Result, apart: Mapping[int, float]) -> float:
    """Measured over predicted time, the mean over the loads, the near ones counting most (inverse squares): what the
    profile does not know of a plan at these it will not know in between."""
    known = [
        (1 / distance**2, measured.seconds / predicted.seconds)
        for number, distance in apart.items()
        if (predicted := result.candidate.predicted[number]) and (measured := result.measured[number])
    ]
    return sum(weight * ratio for weight, ratio in known) / sum(weight for weight, _ in known) if known else 1.0


def _apart(a: Place, b: Place) -> float:
    """The larger of the ratios of decode tokens and of keys together, as a logarithm."""
    ratios = a[0] / b[0], a[0] * a[1] / (b[0] * b[1])
    return max(abs(math.log(ratio)) for ratio in ratios)
