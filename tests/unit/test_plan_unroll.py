"""Unrolling a plan: dependencies against a reference that looks at every element, and orders against both."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import LLAMA, MIXTRAL, chain, closure, must_precede, operation_lists, plans

from nf.errors import PlanError
from nf.graphs.plan import (
    LayerStep,
    NanoOperation,
    PipelinePlan,
    Stream,
    cross_stream_waits,
    nano_batch_plan,
    sequential_plan,
    unroll,
    validate,
)
from nf.graphs.unroll import layers_to_prove
from nf.models.operations import PER_LAYER_BUFFERS, Operation, Resource, Rows

Case = tuple[tuple[Operation, ...], PipelinePlan]

valid_cases = operation_lists().flatmap(lambda ops: st.tuples(st.just(ops), plans(ops)))
any_cases = operation_lists().flatmap(lambda ops: st.tuples(st.just(ops), plans(ops, ordered=False)))
seeds = st.none() | st.integers(0, 1 << 32).map(Random)


def edges(steps: tuple[LayerStep, ...]) -> set[tuple[int, int]]:
    return {(other, index) for index, step in enumerate(steps) for other in step.depends_on}


@settings(max_examples=150, deadline=None)
@given(case=valid_cases, num_layers=st.integers(1, 4), interleave=seeds)
def test_dependencies_are_those_of_the_reference(case: Case, num_layers: int, interleave: Random | None) -> None:
    operations, plan = case
    steps = unroll(plan, operations, num_layers, interleave)
    pairs = must_precede(steps, operations)
    assert all(before < after for before, after in pairs)  # the order is valid
    assert closure(len(steps), edges(steps)) == closure(len(steps), pairs)


@settings(max_examples=100, deadline=None)
@given(case=valid_cases, num_layers=st.integers(1, 4))
def test_only_direct_dependencies_are_reported(case: Case, num_layers: int) -> None:
    operations, plan = case
    steps = unroll(plan, operations, num_layers)
    before = closure(len(steps), edges(steps))
    for step in steps:
        for other in step.depends_on:
            assert not any(before[third] >> other & 1 for third in step.depends_on)


@settings(max_examples=100, deadline=None)
@given(case=valid_cases, num_layers=st.integers(1, 4), interleave=seeds)
def test_every_step_runs_once_and_streams_keep_their_order(
    case: Case, num_layers: int, interleave: Random | None
) -> None:
    operations, plan = case
    steps = unroll(plan, operations, num_layers, interleave)
    for index, stream in enumerate(plan.streams):
        expected = [
            (item.operation, plan.nano_batches[item.nano_batch], round_ - item.lag)
            for round_ in range(num_layers + plan.max_lag)
            for item in stream.nano_operations
            if 0 <= round_ - item.lag < num_layers
        ]
        ran = [(step.operation.name, (step.start, step.stop), step.layer) for step in steps if step.stream == index]
        assert ran == expected
    assert len(steps) == num_layers * sum(len(stream.nano_operations) for stream in plan.streams)


def run_symbolically(steps: tuple[LayerStep, ...], num_decode: int) -> dict[tuple[str, int, int], int]:
    """Run the steps on hashes instead of numbers: each row written records all it was computed from."""
    state: dict[tuple[str, int, int], int] = {}
    for step in steps:
        operation = step.operation

        def key(buffer: str, row: int, layer: int = step.layer) -> tuple[str, int, int]:
            return buffer, layer if buffer in PER_LAYER_BUFFERS else -1, row

        kinds = [Rows.DECODE if row < num_decode else Rows.PREFILL for row in range(step.stop)]
        for row in range(step.start, step.stop):
            if not kinds[row].meets(operation.rows):
                continue
            inputs = [state.get(key(buffer, row), 0) for buffer in operation.reads]
            inputs += [
                state.get(key(buffer, earlier), 0)
                for buffer in operation.reads_before
                for earlier in range(row + 1)
                if kinds[earlier] is kinds[row]
            ]
            for buffer in operation.writes:
                state[key(buffer, row)] = hash((operation.name, buffer, step.layer, row, *inputs))
    return state


@settings(max_examples=150, deadline=None)
@given(case=valid_cases, num_layers=st.integers(1, 4), interleave=seeds, num_decode=st.integers(0, 6))
def test_results_equal_those_of_the_sequential_plan(
    case: Case, num_layers: int, interleave: Random | None, num_decode: int
) -> None:
    operations, plan = case
    sequential = sequential_plan(operations, plan.dense_batch_size)
    expected = run_symbolically(unroll(sequential, operations, num_layers), num_decode)
    assert run_symbolically(unroll(plan, operations, num_layers, interleave), num_decode) == expected


@settings(max_examples=100, deadline=None)
@given(case=valid_cases, num_layers=st.integers(1, 4), interleave=seeds)
def test_waits_and_stream_order_imply_every_dependency_and_no_wait_is_spare(
    case: Case, num_layers: int, interleave: Random | None
) -> None:
    operations, plan = case
    steps = unroll(plan, operations, num_layers, interleave)
    waits = {(other, index) for index, others in enumerate(cross_stream_waits(steps)) for other in others}
    assert waits <= edges(steps)
    assert all(steps[a].stream != steps[b].stream for a, b in waits)
    implied = closure(len(steps), waits | chain(steps))
    assert all(implied[b] >> a & 1 for a, b in must_precede(steps, operations))
    for spare in waits:
        without = closure(len(steps), (waits - {spare}) | chain(steps))
        assert not without[spare[1]] >> spare[0] & 1


@settings(max_examples=150, deadline=None)
@given(case=any_cases)
def test_a_plan_deadlocks_soon_or_never(case: Case) -> None:
    operations, plan = case
    try:
        validate(plan, operations)
    except PlanError:
        with pytest.raises(PlanError, match="waits for"):
            unroll(plan, operations, 3 * layers_to_prove(plan))
    else:
        for num_layers in (1, 2, 3, 3 * layers_to_prove(plan)):
            unroll(plan, operations, num_layers)


@settings(max_examples=60, deadline=None)
@given(case=any_cases, num_layers=st.integers(1, 3))
def test_a_plan_deadlocks_exactly_if_streams_and_dependencies_form_a_circle(case: Case, num_layers: int) -> None:
    operations, plan = case
    named = {operation.name: operation for operation in operations}
    steps = [
        LayerStep(named[item.operation], round_ - item.lag, *plan.nano_batches[item.nano_batch], s, ())
        for s, stream in enumerate(plan.streams)
        for round_ in range(num_layers + plan.max_lag)
        for item in stream.nano_operations
        if 0 <= round_ - item.lag < num_layers
    ]
    left = set(range(len(steps)))
    pairs = must_precede(steps, operations) | chain(steps)
    while free := {b for b in left if not any(a in left for a, other in pairs if other == b)}:
        left -= free
    if left:
        with pytest.raises(PlanError):
            unroll(plan, operations, num_layers)
    else:
        unroll(plan, operations, num_layers)


def test_a_prefill_chunk_cut_by_a_nano_batch_boundary_waits_for_the_keys_before_it() -> None:
    """Rows 4 … 7 may hold the rest of a prompt whose first tokens are rows 0 … 3; those must be in the cache."""
    rope = Operation("rope", Resource.MEMORY, ("qkv",), ("q", "kv"))
    attend = Operation("attend", Resource.COMPUTE, ("q", "kv"), ("attn",), rows=Rows.PREFILL)
    attend_before = Operation("attend", Resource.COMPUTE, ("q",), ("attn",), reads_before=("kv",), rows=Rows.PREFILL)
    # The second nano-batch first: right only if it does not need the first one's keys.
    order = [("rope", 1), ("attend", 1), ("rope", 0), ("attend", 0)]
    plan = PipelinePlan("p", 8, ((0, 4), (4, 8)), (Stream("s", tuple(NanoOperation(*item) for item in order)),))
    validate(plan, [rope, attend])
    with pytest.raises(PlanError, match="attend of nano-batch 1 in layer 0 waits for rope of nano-batch 0 in layer 0"):
        validate(plan, [rope, attend_before])


def test_decode_attention_needs_no_other_nano_batch() -> None:
    steps = unroll(nano_batch_plan(LLAMA, 256), LLAMA, 3)
    for step in steps:
        if step.operation.name == "decode_attention":
            assert [steps[i].operation.name for i in step.depends_on] == ["rope_append"]
            assert all((steps[i].start, steps[i].stop) == (step.start, step.stop) for i in step.depends_on)


def test_the_cache_belongs_to_a_layer_and_other_buffers_are_used_again() -> None:
    append = Operation("append", Resource.MEMORY, (), ("kv",))
    attend = Operation("attend", Resource.MEMORY, ("kv",), ())
    project = Operation("project", Resource.COMPUTE, (), ("q",))
    read = Operation("read", Resource.MEMORY, ("q",), ())
    steps = unroll(sequential_plan([append, attend], 4), [append, attend], 2)
    assert [step.depends_on for step in steps] == [(), (0,), (), (2,)]
    steps = unroll(sequential_plan([project, read], 4), [project, read], 2)
    assert [step.depends_on for step in steps] == [(), (0,), (1,), (2,)]


def test_the_order_is_the_same_every_time_and_a_seed_draws_others() -> None:
    plan = nano_batch_plan(MIXTRAL, 256)
    assert unroll(plan, MIXTRAL, 4) == unroll(plan, MIXTRAL, 4)
    assert unroll(plan, MIXTRAL, 4, Random(1)) == unroll(plan, MIXTRAL, 4, Random(1))
    drawn = {tuple((s.stream, s.layer) for s in unroll(plan, MIXTRAL, 4, Random(seed))) for seed in range(5)}
    assert len(drawn) == 5


def test_the_sequential_plan_runs_layer_by_layer_in_order_of_declaration() -> None:
    steps = unroll(sequential_plan(LLAMA, 32), LLAMA, 3)
    assert [step.operation for step in steps] == list(LLAMA) * 3
    assert [step.layer for step in steps] == [layer for layer in range(3) for _ in LLAMA]
    assert cross_stream_waits(steps) == ((),) * len(steps)


def test_streams_that_wait_for_each_other_are_told_with_both_nano_operations() -> None:
    ping = Operation("ping", Resource.COMPUTE, (), ("a",))
    pong = Operation("pong", Resource.COMPUTE, ("a",), ("b",))
    plan = PipelinePlan(
        "p",
        8,
        ((0, 4), (4, 8)),
        (
            Stream("left", (NanoOperation("pong", 0), NanoOperation("ping", 1))),
            Stream("right", (NanoOperation("pong", 1), NanoOperation("ping", 0))),
        ),
    )
    with pytest.raises(PlanError) as caught:
        unroll(plan, [ping, pong], 1)
    assert str(caught.value) == (
        "streams: they wait for each other for ever: "
        "pong of nano-batch 0 in layer 0 waits for ping of nano-batch 0 in layer 0, "
        'which stream "right" runs after pong of nano-batch 1 in layer 0; '
        "pong of nano-batch 1 in layer 0 waits for ping of nano-batch 1 in layer 0, "
        'which stream "left" runs after pong of nano-batch 0 in layer 0'
    )


@pytest.mark.parametrize("num_layers", [0, -1])
def test_there_must_be_a_layer(num_layers: int) -> None:
    with pytest.raises(PlanError, match=r"^num_layers: must be at least 1"):
        unroll(sequential_plan(LLAMA, 8), LLAMA, num_layers)


def test_a_plan_of_a_large_model_has_a_chain_per_nano_batch() -> None:
    """80 layers, 9 operations, 4 nano-batches on 4 streams: as many steps, and waits only where KV is read before."""
    ranges = tuple(pairwise(range(0, 2049, 512)))
    streams = tuple(Stream(f"s{n}", tuple(NanoOperation(op.name, n) for op in LLAMA)) for n in range(4))
    steps = unroll(PipelinePlan("p", 2048, ranges, streams), LLAMA, 80)
    assert len(steps) == 80 * 9 * 4
    waiting = {steps[i].operation.name for i, others in enumerate(cross_stream_waits(steps)) if others}
    assert waiting == {"prefill_attention"}
