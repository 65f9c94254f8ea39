"""Stage I: periods, orders and cuts against brute force, an independent replay and what NanoFlow's authors found."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import LLAMA, MIXTRAL, operation_lists
from planning_cases import (
    BATCH_8B,
    BATCH_70B,
    PUBLISHED_8B,
    PUBLISHED_70B,
    class_of,
    costs_8b,
    costs_70b,
    layer_8b,
    layer_70b_all_gather,
    layer_70b_all_reduce,
)

from nf.errors import InputError
from nf.graphs.plan import PipelinePlan, unroll, validate
from nf.models.operations import Operation
from nf.planning.nano_layer import CHUNK, BatchShape, CostOf, NanoLayer, nano_layer
from nf.planning.order import best_order, least_period
from nf.planning.profile import Cost, Sms
from nf.planning.rounds import Rounds, critical_circle
from nf.planning.structure import Structure, StructureSearch, search_structures, structure_bound


def replayed_period(
    plan: PipelinePlan, operations: Sequence[Operation], batch: BatchShape, cost_of: CostOf, layers: int = 72
) -> float:
    """Seconds per layer when every step of the unrolled plan starts as soon as its stream and dependencies allow."""
    ends: list[float] = []
    free = [0.0] * len(plan.streams)
    layer_ends = [0.0] * layers
    for step in unroll(plan, operations, layers):
        start = max([free[step.stream], *(ends[i] for i in step.depends_on)])
        rows = batch.rows(step.operation, step.start, step.stop)
        ends.append(start + cost_of(step.operation, rows, "all").seconds)
        free[step.stream] = ends[-1]
        layer_ends[step.layer] = max(layer_ends[step.layer], ends[-1])
    # Patterns over several layers end as they began after 24 of them; the last layers run dry.
    return (layer_ends[layers - 12] - layer_ends[layers - 36]) / 24


def circles(count: int, edges: Sequence[tuple[int, int, int]]) -> list[tuple[list[int], int]]:
    """Every simple circle: its nodes and its height."""
    found = []

    def walk(path: list[int], height: int) -> None:
        for before, after, step in edges:
            if before != path[-1]:
                continue
            if after == path[0]:
                found.append((path, height + step))
            elif after > path[0] and after not in path:
                walk([*path, after], height + step)

    for node in range(count):
        walk([node], 0)
    return found


@st.composite
def event_graphs(draw: st.DrawFn) -> tuple[list[float], list[tuple[int, int, int]]]:
    """Edges that lead back, or to the same node, have a height."""
    count = draw(st.integers(1, 5))
    node = st.integers(0, count - 1)
    edges = draw(st.lists(st.tuples(node, node, st.integers(0, 2)), max_size=10))
    seconds = draw(st.lists(st.integers(0, 9).map(float), min_size=count, max_size=count))
    return seconds, [(a, b, height if a < b else height + 1) for a, b, height in edges]


@settings(deadline=None, max_examples=100)
@given(event_graphs())
def test_the_critical_circle_is_the_slowest_of_all(graph: tuple[list[float], list[tuple[int, int, int]]]) -> None:
    seconds, edges = graph
    every = circles(len(seconds), edges)
    want = max((sum(seconds[i] for i in nodes) / height for nodes, height in every), default=0.0)
    period, nodes = critical_circle(seconds, edges)
    assert period == pytest.approx(want)
    if period:
        assert any(
            set(nodes) == set(other) for other, height in every if sum(seconds[i] for i in other) == want * height
        )


def test_an_order_that_deadlocks_has_no_period() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        critical_circle([1.0, 1.0], [(0, 1, 0), (1, 0, 0)])


def brute_force_period(layer: NanoLayer) -> float:
    """The best of all orders of all lanes with all lags of up to 2 rounds."""
    best = float("inf")
    lanes = layer.lanes
    for lags in product(range(3), repeat=len(layer.tasks)):
        waits = [(a, b, lags[b] - lags[a] + gap) for b, ds in enumerate(layer.dependencies) for a, gap in ds]
        if min(lags) or any(height < 0 for _, _, height in waits):
            continue
        for orders in product(*(permutations(tasks) for tasks in lanes.values())):
            rounds = Rounds(layer, dict(zip(lanes, orders, strict=True)), lags)
            try:
                best = min(best, rounds.period())
            except ValueError:
                continue
    return best


@st.composite
def small_layers(draw: st.DrawFn) -> tuple[tuple[Operation, ...], NanoLayer]:
    """At most five tasks; some of them take no time."""
    operations = draw(operation_lists().filter(lambda ops: len(ops) <= 4))
    cut = draw(st.sampled_from([None, *operations])) if len(operations) <= 4 else None
    cuts = {cut.name: (1,)} if cut else {}
    seconds = {o.name: draw(st.integers(0, 5)) for o in operations}
    seconds[operations[0].name] += 1

    def cost_of(operation: Operation, rows: int, _: Sms) -> Cost:
        return Cost(float(seconds[operation.name] * rows), 0.0)

    batch = BatchShape(3, draw(st.integers(0, 3)))
    return operations, nano_layer(operations, batch, cuts, cost_of, lambda o: str(o.resource))


@settings(deadline=None, max_examples=15)
@given(small_layers())
def test_the_best_order_is_the_best_of_all(case: tuple[tuple[Operation, ...], NanoLayer]) -> None:
    operations, layer = case
    if not sum(layer.seconds):
        return
    ordering = best_order(layer, 10.0)
    assert ordering.rounds is not None
    want = brute_force_period(layer)
    assert ordering.rounds.period() == pytest.approx(want)
    assert ordering.bound == pytest.approx(want, rel=1e-4)  # the solver's tolerance
    assert least_period(layer) <= want * (1 + 1e-9)
    validate(ordering.rounds.plan("drawn", 3), operations)
    assert best_order(layer, 10.0, shorter_than=want * 0.99).rounds is None


def check(search: StructureSearch, operations: Sequence[Operation], batch: BatchShape, cost_of: CostOf) -> None:
    """What must hold of everything a search returns."""
    periods = [structure.period for structure in search.structures]
    assert search.bound <= min(periods) * (1 + 1e-9)
    assert 0 <= search.gap < 1
    assert periods[0] <= min(periods) * (1 + 1e-3)
    assert any(not any(structure.cuts.values()) for structure in search.structures)  # not to split is an option
    for structure in search.structures:
        check_structure(structure, operations, batch, cost_of)


def check_structure(structure: Structure, operations: Sequence[Operation], batch: BatchShape, cost_of: CostOf) -> None:
    assert structure.bound <= structure.period * (1 + 1e-6)
    plan = structure.rounds.plan("found", batch.tokens)
    validate(plan, operations)
    assert PipelinePlan.from_json(plan.to_json()) == plan
    assert replayed_period(plan, operations, batch, cost_of) == pytest.approx(structure.period, rel=1e-6)
    for operation in operations:
        ends = (0, *structure.cuts[operation.name], batch.tokens)
        assert all(a < b and a % CHUNK == 0 for a, b in pairwise(ends))
        ranges = [(t.start, t.stop) for t in structure.rounds.layer.tasks if t.operation == operation]
        assert ranges == list(pairwise(ends))  # every token once


def test_8b_is_at_least_as_short_as_published() -> None:
    search = search_structures(layer_8b(), BATCH_8B, costs_8b(), seconds=60, lane=class_of)
    check(search, layer_8b(), BATCH_8B, costs_8b())
    assert search.best.period <= PUBLISHED_8B
    assert search.gap < 0.05


@pytest.mark.parametrize(
    "operations", [layer_70b_all_reduce(), layer_70b_all_gather()], ids=["all-reduce", "all-gather"]
)
def test_70b_in_two_halves_is_at_least_as_short_as_published(operations: tuple[Operation, ...]) -> None:
    """One cut through all operations is the second cutting that the search tries, and its best order is proved."""
    cuts = dict.fromkeys((operation.name for operation in operations), (1024,))
    ordering = best_order(nano_layer(operations, BATCH_70B, cuts, costs_70b(), class_of), 30.0)
    assert ordering.rounds is not None
    structure = Structure(ordering.rounds, ordering.rounds.period(), ordering.bound)
    check_structure(structure, operations, BATCH_70B, costs_70b())
    assert structure.period <= PUBLISHED_70B
    assert structure.bound == pytest.approx(structure.period, rel=1e-3)


def test_without_time_there_is_the_sequential_structure() -> None:
    search = search_structures(layer_8b(), BATCH_8B, costs_8b(), seconds=0.0, lane=class_of)
    check(search, layer_8b(), BATCH_8B, costs_8b())
    (only,) = search.structures
    assert not any(only.cuts.values())


@settings(deadline=None, max_examples=5)
@given(
    operations=st.sampled_from([LLAMA, MIXTRAL]),
    chunks=st.integers(1, 8),
    decode_share=st.floats(0, 1),
    weights=st.lists(st.integers(1, 20), min_size=9, max_size=11),
    fixed=st.integers(0, 300),
    odd=st.integers(0, 127),
)
def test_whatever_is_found_holds(
    operations: tuple[Operation, ...], chunks: int, decode_share: float, weights: list[int], fixed: int, odd: int
) -> None:
    tokens = chunks * CHUNK + odd
    batch = BatchShape(tokens, int(tokens * decode_share))
    per_row = {o.name: weights[i % len(weights)] for i, o in enumerate(operations)}

    def cost_of(operation: Operation, rows: int, _: Sms) -> Cost:
        return Cost((fixed + rows * per_row[operation.name]) * 1e-7 if rows else 0.0, 0.0)

    search = search_structures(operations, batch, cost_of, seconds=0.4, keep=4)
    check(search, operations, batch, cost_of)
    alone = sum(cost_of(o, batch.rows(o, 0, tokens), "all").seconds for o in operations)
    assert search.best.period <= alone * (1 + 1e-9)


def test_the_bound_knows_the_best_way_to_cut_each_operation() -> None:
    """With a step in its duration, two halves of 256 beat one of 512."""
    operation = layer_8b()[0]
    seconds: Mapping[int, float] = {128: 2.0, 256: 2.0, 384: 7.0, 512: 9.0}
    bound = structure_bound((operation,), BatchShape(512, 0), lambda _, rows, __: Cost(seconds[rows], 0.0))
    assert bound == 4.0


def test_bad_batches_and_a_missing_solver_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in (BatchShape(0, 0), BatchShape(128, 129), BatchShape(128, -1)):
        with pytest.raises(InputError, match="batch"):
            search_structures(layer_8b(), batch, costs_8b())
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(InputError, match=r"nf\[plan\]"):
        search_structures(layer_8b(), BATCH_8B, costs_8b())
