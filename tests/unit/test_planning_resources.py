"""Stage II: shares and arrangements against sums done by hand, a check of every overlap, and small steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import LLAMA
from planning_cases import (
    BATCH_8B,
    BATCH_70B,
    CAP,
    GPU_SMS,
    IDLE,
    class_of,
    costs_8b,
    costs_70b,
    layer_8b,
    layer_70b_all_reduce,
    made_up_profile,
)

from nf.errors import InputError
from nf.graphs.plan import PipelinePlan, sequential_plan, unroll, validate
from nf.models.operations import Operation, Resource
from nf.planning import shares as share_module
from nf.planning.admission import improve_shares
from nf.planning.interference import A100_PUBLISHED, Curve, CurvePoint, published
from nf.planning.nano_layer import BatchShape, CostOf, nano_layer, profiled_costs
from nf.planning.order import best_order
from nf.planning.overlap import Arrangement, replay
from nf.planning.profile import Cost, PowerLimit, Sms
from nf.planning.resources import SEQUENTIAL, arrangements, cuts_in_words, period_bound, propose
from nf.planning.rounds import Rounds
from nf.planning.shares import Shares, _ShareProgram, best_shares, share_candidates
from nf.planning.structure import Structure, search_structures

HALVES = BatchShape(2048, 1024)
QUARTER = BatchShape(1024, 512)


def check_shares(shares: Shares, operations: Sequence[Operation], curves: Mapping[str, Curve]) -> None:
    """Play five layers at the pace and the starts that are claimed, with dependencies from the unrolled plan."""
    rounds = shares.rounds
    tasks = rounds.layer.tasks
    plan = rounds.plan("shared", tasks[-1].stop)
    validate(plan, operations)
    index = {(task.operation.name, task.start): i for i, task in enumerate(tasks)}
    least = min(rounds.lags)
    spans: list[tuple[float, float, int, int]] = []
    for step in unroll(plan, operations, 5):
        i = index[step.operation.name, step.start]
        start = shares.starts[i] + (step.layer + rounds.lags[i] - least) * shares.period
        spans.append((start, start + shares.seconds[i], step.stream, i))
        slack = 1e-5 * shares.period
        assert all(spans[other][1] <= start + slack for other in step.depends_on)
    for stream in range(len(plan.streams)):
        own = sorted(span for span in spans if span[2] == stream and span[0] < span[1])
        assert all(a[1] <= b[0] + slack for a, b in pairwise(own))
    for start, end, _, _ in spans:
        for moment in (start + slack, end - slack):
            running = [i for a, b, _, i in spans if a + slack / 2 < moment < b - slack / 2]
            assert sum(shares.shares[i] for i in running) <= 1 + 1e-6
    for i, task in enumerate(tasks):
        if task.cost.seconds and task.lane == "compute":
            assert shares.seconds[i] == pytest.approx(task.cost.seconds / shares.shares[i])
        elif task.cost.seconds:
            known = {round(p.share, 6): p.speed for p in curves[task.lane]} | {1.0: 1.0}
            assert shares.seconds[i] == pytest.approx(task.cost.seconds / known[shares.shares[i]])


def test_two_independent_operations_share_the_gpu_as_sums_say() -> None:
    """One second each: at 0.4 both take 1 / 0.6 = 1.667 s. Any other share of the curve makes one of them longer."""
    operations = (
        Operation("gemm", Resource.COMPUTE, ("a",), ("b",)),
        Operation("read", Resource.MEMORY, ("c",), ("d",)),
    )
    layer = nano_layer(operations, BatchShape(1, 0), {}, lambda *_: Cost(1.0, 500.0), class_of)
    rounds = best_order(layer, 5.0).rounds
    assert rounds is not None
    assert rounds.period() == pytest.approx(1.0)
    found = best_shares(rounds, A100_PUBLISHED, seconds=10.0)
    assert found.period == pytest.approx(1 / 0.6, rel=1e-4)
    assert found.bound == pytest.approx(1 / 0.6, rel=1e-3)
    assert found.shares == pytest.approx((0.6, 0.4))
    check_shares(found, operations, A100_PUBLISHED)

    # 400 J beyond idle power in each, 800 J in all; 300 W beyond idle power are allowed.
    powered = best_shares(rounds, A100_PUBLISHED, power=PowerLimit(400.0, 100.0), seconds=10.0)
    assert powered.period == pytest.approx(800 / 300, rel=1e-4)
    assert powered.joules == pytest.approx(400 * powered.period, rel=1e-4)
    check_shares(powered, operations, A100_PUBLISHED)

    nothing_gained = {"memory": published({0.5: 0.5})}
    assert best_shares(rounds, nothing_gained, seconds=10.0).period == pytest.approx(2.0, rel=1e-4)
    with pytest.raises(InputError, match="memory"):
        best_shares(rounds, {"network": A100_PUBLISHED["network"]})


def test_8b_shares_hold_and_are_proved() -> None:
    layer = nano_layer(layer_8b(), BATCH_8B, dict.fromkeys((o.name for o in layer_8b()), (384,)), costs_8b(), class_of)
    rounds = best_order(layer, 5.0).rounds
    assert rounds is not None
    found = best_shares(rounds, A100_PUBLISHED, seconds=30.0)
    check_shares(found, layer_8b(), A100_PUBLISHED)
    alone = sum(task.cost.seconds for task in layer.tasks)
    least = sum(t.cost.seconds * (1.0 if t.lane == "compute" else 0.4) for t in layer.tasks)  # min of R / P: 0.1 / 0.25
    assert least <= found.period < 0.95 * alone
    assert found.bound == pytest.approx(found.period, rel=1e-3)


def test_70b_shares_hold_with_three_resources() -> None:
    operations = layer_70b_all_reduce()
    structures = [halved(operations, BATCH_70B, costs_70b(), cut) for cut in (640, 1024)]
    found = share_candidates(structures, A100_PUBLISHED, seconds=0.6, count=2)
    for shares in found:
        check_shares(shares, operations, A100_PUBLISHED)
        assert 0 <= shares.gap < 1
    assert found[0].period <= found[1].period


def halved(operations: tuple[Operation, ...], batch: BatchShape, cost_of: CostOf, cut: int) -> Structure:
    """The best order for one cut through all operations."""
    cuts = dict.fromkeys((operation.name for operation in operations), (cut,))
    rounds = best_order(nano_layer(operations, batch, cuts, cost_of, class_of), 10.0).rounds
    assert rounds is not None
    return Structure(rounds, rounds.period(), rounds.period())


@settings(deadline=None, max_examples=4)
@given(
    operations=st.sampled_from([layer_8b(), layer_70b_all_reduce()]),
    decode=st.sampled_from([0, 128, 384, 1024]),
    weights=st.lists(st.integers(1, 20), min_size=8, max_size=8),
    power=st.sampled_from([None, PowerLimit(700.0, 126.0), PowerLimit(450.0, 126.0)]),
)
def test_whatever_shares_are_found_hold(
    operations: tuple[Operation, ...], decode: int, weights: list[int], power: PowerLimit | None
) -> None:
    per_row = {o.name: weight for o, weight in zip(operations, weights, strict=False)}

    def cost_of(operation: Operation, rows: int, _: Sms) -> Cost:
        seconds = (50 + rows * per_row[operation.name]) * 1e-7 if rows else 0.0
        return Cost(seconds, 600 * seconds)

    structure = halved(operations, BatchShape(1024, decode), cost_of, 512)
    assert first_guess_holds(structure.rounds, power)
    found = best_shares(structure.rounds, A100_PUBLISHED, power=power, seconds=0.2)
    check_shares(found, operations, A100_PUBLISHED)
    assert found.bound <= found.period
    if power:
        assert found.joules <= power.cap_watts * found.period * (1 + 1e-6)


def first_guess_holds(rounds: Rounds, power: PowerLimit | None) -> bool:
    """What local search finds is a solution to the solver; it would silently drop what is not."""
    program = _ShareProgram(rounds, A100_PUBLISHED, power)
    found: list[tuple[float, list[float], tuple[float, ...]]] = []

    def kept(*args: Any, **limits: float) -> tuple[float, list[float], tuple[float, ...]]:
        found.append(improve_shares(*args, **limits))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share_module, "improve_shares", kept)
        program._guess(30.0)
    period, shares, starts = found[0]
    return math.isinf(period) or program.program.holds(program._values(period, shares, starts))


def stepped_period(rounds: Rounds, arrangement: Arrangement, cost_of: CostOf, operations: Sequence[Operation]) -> float:
    """Seconds per layer by moving all streams of the unrolled plan ahead in small steps."""
    layers, plan = 7, rounds.plan("stepped", rounds.layer.tasks[-1].stop)
    steps = unroll(plan, operations, layers)
    queues = [[i for i, step in enumerate(steps) if step.stream == s] for s in range(len(plan.streams))]
    rows = {(t.operation.name, t.start): t.rows for t in rounds.layer.tasks}
    names = [stream.name for stream in plan.streams]
    left = [
        cost_of(step.operation, rows[step.operation.name, step.start], arrangement.sms[names[step.stream]]).seconds
        for step in steps
    ]
    tick = sum(left) / layers / 4000
    time, ended, finished = 0.0, [False] * len(steps), [0.0] * layers
    while any(queues):
        running = [q[0] for q in queues if q and all(ended[i] for i in steps[q[0]].depends_on)]
        lanes = {names[steps[i].stream]: i for i in running}
        for lane, i in lanes.items():
            speed = 1.0
            if lane == "compute":
                speed -= sum(1 - arrangement.points[other].kept_in_partition for other in lanes if other != "compute")
            elif "compute" in lanes:
                speed = arrangement.points[lane].speed_in_partition
            left[i] -= tick * speed
        time += tick
        for queue in queues:
            while queue and left[queue[0]] <= 0 and all(ended[i] for i in steps[queue[0]].depends_on):
                done = queue.pop(0)
                ended[done] = True
                finished[steps[done].layer] = time
    return (finished[layers - 2] - finished[2]) / (layers - 4)


@settings(deadline=None, max_examples=4)
@given(
    kept=st.floats(0.3, 1.0), speed=st.floats(0.2, 1.0), cut=st.sampled_from([512, 1024, 1536]), own=st.integers(2, 6)
)
def test_the_replay_agrees_with_small_steps(kept: float, speed: float, cut: int, own: int) -> None:
    cost_of = profiled_costs(made_up_profile(LLAMA, kept=0.9, speed=0.9), HALVES)
    cuts = dict.fromkeys((o.name for o in LLAMA), (cut,))
    rounds = best_order(nano_layer(LLAMA, HALVES, cuts, cost_of), 2.0).rounds
    assert rounds is not None
    sms: dict[str, Sms] = {"compute": GPU_SMS - 8 * own, "memory": 8 * own}
    arrangement = Arrangement("drawn", sms, {"memory": CurvePoint(8 * own, kept, speed, kept, speed)})
    steady = replay(rounds, arrangement, cost_of, None)
    assert steady.seconds == pytest.approx(stepped_period(rounds, arrangement, cost_of, LLAMA), rel=0.01)


def test_without_interference_the_replay_is_the_period() -> None:
    cost_of = profiled_costs(made_up_profile(LLAMA, kept=1.0, speed=1.0), HALVES)
    free = Arrangement("free", {"compute": "all", "memory": "all"}, {"memory": CurvePoint("all", 1, 1, 1, 1, CAP)})
    for structure in search_structures(LLAMA, HALVES, cost_of, seconds=0.3, keep=4).structures:
        steady = replay(structure.rounds, free, cost_of, PowerLimit(2 * CAP, IDLE))
        assert steady.seconds == pytest.approx(structure.period, rel=1e-6)
        # Someone always works, and whoever does draws 700 W.
        if not any(structure.cuts.values()):
            assert steady.joules == pytest.approx(CAP * steady.seconds)


def test_a_power_limit_stretches_time_until_the_energy_fits() -> None:
    profile = made_up_profile(LLAMA, kept=1.0, speed=1.0, watts=math.nan)  # beside each other, powers add up
    cost_of = profiled_costs(profile, HALVES)
    rounds = search_structures(LLAMA, HALVES, cost_of, seconds=0.3).best.rounds
    free = Arrangement("free", {"compute": "all", "memory": "all"}, {"memory": CurvePoint("all", 1, 1, 1, 1)})
    steady = replay(rounds, free, cost_of, PowerLimit(CAP, IDLE))
    dynamic = sum(t.cost.joules - IDLE * t.cost.seconds for t in rounds.layer.tasks)
    assert steady.seconds == pytest.approx(dynamic / (CAP - IDLE), rel=1e-6)
    assert steady.joules == pytest.approx(CAP * steady.seconds)


def plan_times(plan: PipelinePlan, batch: BatchShape, cost_of: CostOf) -> dict[str, float]:
    """Seconds of work of each stream in a round, alone on its SMs."""
    operations = {o.name: o for o in LLAMA}
    return {
        stream.name: sum(
            cost_of(
                operations[i.operation],
                batch.rows(operations[i.operation], *plan.nano_batches[i.nano_batch]),
                stream.sms,
            ).seconds
            for i in stream.nano_operations
        )
        for stream in plan.streams
    }


@pytest.mark.parametrize(("kept", "speed", "gains"), [(0.97, 0.9, True), (0.6, 0.45, True), (0.6, 0.3, False)])
def test_candidates_hold_and_overlap_only_where_it_pays(kept: float, speed: float, gains: bool) -> None:
    profile = made_up_profile(LLAMA, kept=kept, speed=speed)
    cost_of = profiled_costs(profile, QUARTER)
    found = propose(LLAMA, QUARTER, profile, seconds=60, count=6)
    alone = sum(cost_of(o, QUARTER.rows(o, 0, 1024), "all").seconds for o in LLAMA)
    (sequential,) = [c for c in found if c.arrangement == SEQUENTIAL]
    assert sequential.period == pytest.approx(alone)
    assert sequential.joules == pytest.approx(CAP * alone)
    assert (found[0].period < 0.995 * alone) == gains
    assert len({c.plan for c in found}) == len(found) <= 6
    sizes = [sum(len(stream.nano_operations) for stream in c.plan.streams) for c in found]
    kinds = {(c.arrangement, size, round(c.period / found[0].period, 3)) for c, size in zip(found, sizes, strict=True)}
    assert len(kinds) == len(found)  # what the prediction cannot tell apart is there once
    assert [c.period for c in found] == sorted(c.period for c in found)
    for candidate in found:
        validate(candidate.plan, LLAMA, gpu_sms=GPU_SMS)
        assert period_bound(LLAMA, QUARTER, profile) <= candidate.period * (1 + 1e-9)
        assert candidate.joules <= CAP * candidate.period * (1 + 1e-6)
        assert candidate.period >= max(plan_times(candidate.plan, QUARTER, cost_of).values()) * (1 - 1e-9)
        sms = [stream.sms for stream in candidate.plan.streams]
        if "all" not in sms:
            taken = {s.name: s.sms for s in candidate.plan.streams}
            assert taken["memory"] in (16, 32, 48)
            assert taken["compute"] == GPU_SMS - int(taken["memory"])


def test_only_what_the_hardware_can_give_is_considered() -> None:
    profile = made_up_profile(LLAMA, kept=0.9, speed=0.8)
    names = {arrangement.name for arrangement in arrangements(profile, LLAMA)}
    assert "co-resident" in names
    odd = next(pair for pair in profile.co_runs.values() if pair.second.sms == 16)
    profile.add(replace(odd, first=replace(odd.first, sms=119), second=replace(odd.second, sms=13, seconds=1e-9)))
    assert {arrangement.name for arrangement in arrangements(profile, LLAMA)} <= names
    profile.co_runs.clear()
    assert arrangements(profile, LLAMA) == []
    (only,) = propose(LLAMA, HALVES, profile, seconds=1.0)
    assert only.arrangement == SEQUENTIAL
    assert period_bound(LLAMA, HALVES, profile) == only.period


@pytest.mark.parametrize(
    ("nano_batches", "words"),
    [
        ([(0, 2048)], "not cut"),
        ([(0, 512), (512, 2048)], "cut at 512"),
        ([(0, 256), (256, 1024), (1024, 2048)], "cut at 256, 1024"),
        ([(1280, 2048), (0, 640), (640, 1280)], "cut at 640, 1280"),
        ([(0, 512), (0, 2048), (512, 2048)], "partly cut at 512"),
        ([(0, 512), (512, 1024), (0, 1024), (1024, 2048)], "partly cut at 512, 1024"),
    ],
)
def test_cuts_are_told(nano_batches: list[tuple[int, int]], words: str) -> None:
    plan = replace(sequential_plan(LLAMA, 2048), nano_batches=tuple(nano_batches))
    assert cuts_in_words(plan) == words
