"""Stage II of the search for the hardware at hand: which stream gets which SMs, and what comes of it.

shares.py gives every nano-operation a share of its own, as the paper does. A GPU gives shares to streams: partitions
of an even number of SMs that are held all the time, or none, where nano-operations of several streams share SMs as the
hardware sees fit. These arrangements are few, so all that were measured are tried. For the most promising ones,
structures are searched with durations as they will be under them, and every structure that was found is then replayed
under every arrangement, with energy. Not to overlap at all is among the candidates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from time import monotonic

from nf.graphs.builtin import lane_of, sequential_plan
from nf.graphs.pipeline_plan import PAIR
from nf.graphs.plan import PipelinePlan
from nf.models.operations import Operation
from nf.planning.interference import Curve, CurvePoint, curve
from nf.planning.nano_layer import COMPUTE, BatchShape, CostOf, profiled_costs
from nf.planning.overlap import Arrangement, Steady, replay
from nf.planning.profile import Cost, Profile, Sms
from nf.planning.structure import Structure, search_structures, structure_bound

PROMISING = 1.05  # times the sequential period; predictions are wrong by some per cent
MAX_ALIKE = 3  # candidates under one arrangement, as long as there are others
MAX_SEARCHES = 4  # arrangements for which structures are searched; the others use what was found for these
SEQUENTIAL = "sequential"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan and what is predicted of a layer under it at steady state.

    Args:
        arrangement: how its streams divide the GPU; "sequential" if it has only one.
        period: seconds per layer.
        joules: per layer, static power included; NaN where energies are unknown.
    """

    plan: PipelinePlan
    arrangement: str
    period: float
    joules: float


def propose(
    operations: Sequence[Operation],
    batch: BatchShape,
    profile: Profile,
    *,
    seconds: float = 100.0,
    count: int = 8,
    lane: Callable[[Operation], str] = lane_of,
) -> tuple[Proposal, ...]:
    """The plans that are predicted to be the fastest, the sequential one among them, shortest period first.

    Args:
        operations: of one layer, in logical order.
        profile: measurements of all of them, and of pairs where overlapping is to be considered.
        seconds: to search for, roughly.
        count: plans at most, each cut, ordered or arranged in another way.

    Raises:
        InputError: an operation was not measured.
    """
    deadline = monotonic() + seconds
    cost_of, power = profiled_costs(profile, batch), profile.power_limit
    sequential, alone = _sequential(operations, batch, cost_of)
    plans = {sequential: (SEQUENTIAL, alone)}

    options = arrangements(profile, operations, lane)
    promise = {a.name: overlap_bound(a, operations, batch, cost_of, lane) for a in options}
    worth = alone.seconds * PROMISING
    options = sorted((a for a in options if promise[a.name] < worth), key=lambda a: promise[a.name])
    structures: list[Structure] = []
    searches = options[:MAX_SEARCHES]
    for done, arrangement in enumerate(searches):
        left = max(0.0, deadline - monotonic()) / (len(searches) - done)
        slowed = overlapped_costs(arrangement, operations, batch, cost_of, lane)
        structures += search_structures(operations, batch, slowed, seconds=left, keep=count, lane=lane).structures
    for structure, arrangement in product(structures, options):
        steady = replay(structure.rounds, arrangement, cost_of, power)
        plan = structure.rounds.plan("", batch.tokens, sms=arrangement.sms, model=profile.model, gpu=profile.key.gpu)
        plan = replace(plan, name=f"{arrangement.name}, {cuts_in_words(plan)}")
        plans.setdefault(plan, (arrangement.name, steady))
    return _best(plans, count)


def cuts_in_words(plan: PipelinePlan) -> str:
    """Where the dense batch is cut, and whether all operations are, in words."""
    cuts = sorted({edge for edges in plan.nano_batches for edge in edges} - {0, plan.dense_batch_size})
    if not cuts:
        return "not cut"
    partly = any(start < cut < stop for start, stop in plan.nano_batches for cut in cuts)
    return f"{'partly ' if partly else ''}cut at {', '.join(map(str, cuts))}"


def period_bound(
    operations: Sequence[Operation],
    batch: BatchShape,
    profile: Profile,
    lane: Callable[[Operation], str] = lane_of,
) -> float:
    """Seconds per layer that no plan under any measured arrangement can beat, by what ``profile`` predicts."""
    cost_of = profiled_costs(profile, batch)
    options = arrangements(profile, operations, lane)
    bounds = [overlap_bound(arrangement, operations, batch, cost_of, lane) for arrangement in options]
    return min([_sequential(operations, batch, cost_of)[1].seconds, *bounds])


def _best(plans: Mapping[PipelinePlan, tuple[str, Steady]], count: int) -> tuple[Proposal, ...]:
    """The sequential plan, then the shortest periods; of periods that are alike, the fewest nano-operations.

    Plans of one arrangement with equally many nano-operations and the same period are one and the same to the
    prediction: the first of them stands for all, so that what is measured differs.
    """
    proposals = [Proposal(plan, name, steady.seconds, steady.joules) for plan, (name, steady) in plans.items()]
    best = min(proposal.period for proposal in proposals)

    def rank(p: Proposal) -> tuple[float, int, str]:
        return round(p.period / best, 3), _nano_operations(p.plan), p.arrangement

    firsts = {rank(proposal): proposal for proposal in sorted(proposals, key=lambda p: -p.period)}
    ranked = [firsts[key] for key in sorted(firsts)]
    alike: Counter[str] = Counter()
    varied: list[Proposal] = []
    others: list[Proposal] = []
    for proposal in ranked:
        alike[proposal.arrangement] += 1
        (varied if alike[proposal.arrangement] <= MAX_ALIKE else others).append(proposal)
    sequential = next(p for p in ranked if p.arrangement == SEQUENTIAL)
    chosen = [sequential, *(p for p in (*varied, *others) if p is not sequential)][:count]
    return tuple(sorted(chosen, key=lambda p: p.period))


def _nano_operations(plan: PipelinePlan) -> int:
    return sum(len(stream.nano_operations) for stream in plan.streams)


def _sequential(operations: Sequence[Operation], batch: BatchShape, cost_of: CostOf) -> tuple[PipelinePlan, Steady]:
    """What was measured alone at steady state was measured under the power limit, which does not count twice."""
    costs = [cost_of(operation, batch.rows(operation, 0, batch.tokens), "all") for operation in operations]
    steady = Steady(math.fsum(cost.seconds for cost in costs), math.fsum(cost.joules for cost in costs))
    return sequential_plan(operations, batch.tokens), steady


def curves_of_lanes(
    profile: Profile,
    operations: Sequence[Operation],
    lane: Callable[[Operation], str] = lane_of,
    *,
    dominated: bool = False,
) -> dict[str, Curve]:
    """The R → P curve of every lane beside the compute-bound one; none at all if one of them was not measured."""
    names: dict[str, list[str]] = {}
    for operation in operations:
        names.setdefault(lane(operation), []).append(operation.name)
    compute = names.pop(COMPUTE, [])
    curves = {name: curve(profile, compute, own, dominated=dominated) for name, own in names.items()}
    return curves if all(curves.values()) else {}


def arrangements(
    profile: Profile,
    operations: Sequence[Operation],
    lane: Callable[[Operation], str] = lane_of,
    *,
    dominated: bool = False,
) -> list[Arrangement]:
    """Every way to divide the GPU between the lanes that was measured and that the hardware can give.

    Args:
        dominated: take those too that another one beats in everything.
    """
    curves = curves_of_lanes(profile, operations, lane, dominated=dominated)
    return [*_shared(curves), *_partitioned(curves, profile.gpu_sms)] if curves else []


def _shared(curves: Mapping[str, Curve]) -> Iterable[Arrangement]:
    """Without partitions: the hardware divides the SMs."""
    points = {lane: point for lane, curve in curves.items() for point in curve if point.sms == "all"}
    if len(points) == len(curves):
        sms: dict[str, Sms] = dict.fromkeys([COMPUTE, *curves], "all")
        yield Arrangement("co-resident", sms, points)


def _partitioned(curves: Mapping[str, Curve], gpu_sms: int) -> Iterable[Arrangement]:
    """With a partition for every lane; compute-bound operations have what is left."""
    points: dict[str, list[tuple[int, CurvePoint]]] = {
        lane: [(point.sms, point) for point in curve if point.sms != "all" and point.sms % PAIR == 0]
        for lane, curve in curves.items()
    }
    for chosen in product(*points.values()):
        taken = dict(zip(curves, (sms for sms, _ in chosen), strict=True))
        left = gpu_sms - sum(taken.values())
        if left < PAIR:
            continue
        name = " and ".join(f"{sms} SMs for {lane}" for lane, sms in taken.items())
        sms: dict[str, Sms] = {COMPUTE: left, **taken}
        yield Arrangement(name, sms, dict(zip(curves, (point for _, point in chosen), strict=True)))


def overlap_bound(
    arrangement: Arrangement,
    operations: Sequence[Operation],
    batch: BatchShape,
    cost_of: CostOf,
    lane: Callable[[Operation], str] = lane_of,
) -> float:
    """Seconds per layer that no plan under ``arrangement`` can beat, however it is cut and ordered.

    For every lane beside the compute-bound one: x seconds of both together and the rest of each alone take least where
    one of the two has no rest, or where they never overlap.
    """
    bounds = []
    loads = {name: _least_load(arrangement, operations, batch, cost_of, lane, name) for name in arrangement.sms}
    for name, point in arrangement.points.items():
        kept, speed = point.kept_in_partition, point.speed_in_partition
        for_both = (0.0, loads[COMPUTE] / kept, loads[name] / speed)
        bounds.append(
            min(x + max(0.0, loads[COMPUTE] - kept * x) + max(0.0, loads[name] - speed * x) for x in for_both)
        )
    return max(bounds)


def _least_load(
    arrangement: Arrangement,
    operations: Sequence[Operation],
    batch: BatchShape,
    cost_of: CostOf,
    lane: Callable[[Operation], str],
    name: str,
) -> float:
    own = [operation for operation in operations if lane(operation) == name]
    return structure_bound(own, batch, lambda op, rows, _: cost_of(op, rows, arrangement.sms[name]), lane)


def overlapped_costs(
    arrangement: Arrangement,
    operations: Sequence[Operation],
    batch: BatchShape,
    cost_of: CostOf,
    lane: Callable[[Operation], str] = lane_of,
) -> CostOf:
    """Costs as they will be under ``arrangement`` if everything else runs beside compute-bound operations.

    The others take what they take beside those; the compute-bound ones are slowed down evenly by what that costs them
    over a whole layer.
    """
    loads = {name: _least_load(arrangement, operations, batch, cost_of, lane, name) for name in arrangement.sms}
    lost = sum((1 - p.kept_in_partition) * loads[name] / p.speed_in_partition for name, p in arrangement.points.items())
    factors = {name: 1 / point.speed_in_partition for name, point in arrangement.points.items()}
    factors[COMPUTE] = 1 + lost / loads[COMPUTE]

    def slowed(operation: Operation, rows: int, _: Sms) -> Cost:
        name = lane(operation)
        cost = cost_of(operation, rows, arrangement.sms[name])
        return Cost(cost.seconds * factors[name], cost.joules)

    return slowed
