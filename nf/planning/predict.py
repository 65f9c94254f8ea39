"""What a profile says of a whole step under any pipeline plan, not only of those that the search made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nf.graphs.builtin import lane_of
from nf.graphs.pipeline_plan import PipelinePlan
from nf.models.declaration import Model
from nf.models.operations import Operation
from nf.planning.nano_layer import BatchShape, CostOf, nano_layer, profiled_costs
from nf.planning.overlap import Arrangement, replay
from nf.planning.profile import NOTHING, Cost, Profile
from nf.planning.profiling import ENDS
from nf.planning.resources import arrangements, period_bound
from nf.planning.rounds import Rounds


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of a step: seconds and joules, NaN where energies are unknown."""

    seconds: float
    joules: float


def bound(model: Model, profile: Profile, batch: BatchShape) -> float:
    """Seconds of a step that no plan can beat under any arrangement that was measured."""
    period = period_bound(model.operations, batch, profile)
    return _step(Cost(period, math.nan), model, profile, batch).seconds


def of_plan(plan: PipelinePlan, model: Model, profile: Profile, batch: BatchShape) -> Prediction | None:
    """None where the profile does not know how the plan's streams disturb each other."""
    cost_of = profiled_costs(profile, batch)
    if len(plan.streams) == 1:
        layer = _one_stream(plan, model.operations, batch, cost_of)
        return _step(layer, model, profile, batch)
    rounds = rounds_of(plan, model.operations, batch, cost_of)
    arrangement = _arrangement(plan, model.operations, profile)
    if rounds is None or arrangement is None:
        return None
    steady = replay(rounds, arrangement, cost_of, profile.power_limit)
    return _step(Cost(steady.seconds, steady.joules), model, profile, batch)


def rounds_of(plan: PipelinePlan, operations: Sequence[Operation], batch: BatchShape, cost_of: CostOf) -> Rounds | None:
    """The plan as the planner's own terms; None if a stream mixes lanes or a lane has several streams."""
    by_name = {operation.name: operation for operation in operations}
    lanes = [{lane_of(by_name[item.operation]) for item in stream.nano_operations} for stream in plan.streams]
    if any(len(found) != 1 for found in lanes) or len({*map(frozenset, lanes)}) != len(lanes):
        return None
    ranges: dict[str, list[int]] = {}
    for stream in plan.streams:
        for item in stream.nano_operations:
            ranges.setdefault(item.operation, []).append(plan.nano_batches[item.nano_batch][0])
    cuts = {name: tuple(sorted(start for start in starts if start)) for name, starts in ranges.items()}
    layer = nano_layer(operations, batch, cuts, cost_of)
    index = {(task.operation.name, task.start): i for i, task in enumerate(layer.tasks)}
    lags = [0] * len(layer.tasks)
    order: dict[str, tuple[int, ...]] = {}
    for stream, (lane,) in zip(plan.streams, lanes, strict=True):
        tasks = [index[item.operation, plan.nano_batches[item.nano_batch][0]] for item in stream.nano_operations]
        for task, item in zip(tasks, stream.nano_operations, strict=True):
            lags[task] = item.lag
        order[lane] = tuple(tasks)
    return Rounds(layer, order, tuple(lags))


def _one_stream(plan: PipelinePlan, operations: Sequence[Operation], batch: BatchShape, cost_of: CostOf) -> Cost:
    """One nano-operation after the other."""
    by_name = {operation.name: operation for operation in operations}
    (stream,) = plan.streams
    costs = []
    for item in stream.nano_operations:
        operation = by_name[item.operation]
        costs.append(cost_of(operation, batch.rows(operation, *plan.nano_batches[item.nano_batch]), stream.sms))
    return Cost(math.fsum(cost.seconds for cost in costs), math.fsum(cost.joules for cost in costs))


def _arrangement(plan: PipelinePlan, operations: Sequence[Operation], profile: Profile) -> Arrangement | None:
    """The measured arrangement with the plan's SMs per lane."""
    by_name = {operation.name: operation for operation in operations}
    sms = {lane_of(by_name[stream.nano_operations[0].operation]): stream.sms for stream in plan.streams}
    return next((a for a in arrangements(profile, operations, dominated=True) if dict(a.sms) == sms), None)


def _step(layer: Cost, model: Model, profile: Profile, batch: BatchShape) -> Prediction:
    """All layers, logits and sampling of a token for every sequence that decodes."""
    known = any(point.operation == ENDS for point in profile.solos.values())
    after = profile.cost(ENDS, max(1, batch.decode_tokens)) if known else NOTHING
    layers = model.config.num_layers
    return Prediction(layers * layer.seconds + after.seconds, layers * layer.joules + after.joules)
