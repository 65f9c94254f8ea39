"""What capture records, on a double of streams and events that keeps, for every launch, what it is ordered after."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plan_cases import LLAMA, MIXTRAL, must_precede

from nf.graphs import capture as module
from nf.graphs.partition import Lane
from nf.graphs.plan import LayerStep, PipelinePlan, load_plan, nano_batch_plan, sequential_plan, unroll
from nf.graphs.pool import ALIKE, SHORT, GraphPool, StepPlan, capacities, step_plans
from nf.kernels.device import DeviceMemoryError
from nf.models.operations import Operation, Rows

ORIGIN = 1


class Streams:
    """Streams and events as CUDA defines them: a stream is a line, an event is a point on it others can wait for."""

    def __init__(self) -> None:
        self.after: dict[int, frozenset[Any]] = {}  # stream → everything its next launch runs after
        self.launched: dict[Any, frozenset[Any]] = {}  # launch → what it runs after
        self.open_events = 0

    def launch(self, name: Any, stream: int) -> None:
        self.launched[name] = self.after.get(stream, frozenset())
        self.after[stream] = self.launched[name] | {name}

    def event(streams) -> Any:  # noqa: N805 the event below has a self of its own
        class Event:
            def __init__(self) -> None:
                streams.open_events += 1

            def record(self, stream: int) -> None:
                self.point = streams.after.get(stream, frozenset())

            def block(self, stream: int) -> None:
                streams.after[stream] = streams.after.get(stream, frozenset()) | self.point

            def free(self) -> None:
                streams.open_events -= 1

        return Event


def run(
    monkeypatch: pytest.MonkeyPatch, steps: Sequence[LayerStep], lanes: Sequence[Lane]
) -> tuple[Streams, list[bool]]:
    """Everything that capture launches between "begin" and "finish", and whether each launch may overlap its tail."""
    streams, overlaps = Streams(), []
    monkeypatch.setattr(module, "Event", streams.event())
    index = count()

    def launch(step: LayerStep, lane: Lane, overlap: bool) -> None:
        assert lanes[step.stream] is lane
        overlaps.append(overlap)
        streams.launch(next(index), lane.stream)

    streams.launch("begin", ORIGIN)
    module._launch_all(steps, lanes, ORIGIN, launch)
    streams.launch("finish", ORIGIN)
    return streams, overlaps


def lanes_of(plan: PipelinePlan) -> tuple[Lane, ...]:
    if len(plan.streams) == 1:
        return (Lane("only", ORIGIN, 132),)
    return tuple(Lane(stream.name, ORIGIN + 1 + index, 132) for index, stream in enumerate(plan.streams))


@pytest.mark.parametrize("operations", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("name", ["sequential", "nano-batch"])
def test_everything_runs_after_what_it_depends_on(monkeypatch: pytest.MonkeyPatch, name: str, operations: Any) -> None:
    plan = load_plan(name, operations, 512)
    steps = unroll(plan, operations, 3)
    streams, overlaps = run(monkeypatch, steps, lanes_of(plan))
    for before, after in must_precede(steps, operations):
        assert before in streams.launched[after]
    assert all("begin" in streams.launched[index] for index in range(len(steps)))
    assert streams.launched["finish"] >= set(range(len(steps)))
    assert streams.open_events == 0
    if name == "sequential":
        assert all(overlaps)
    else:
        assert not overlaps[0]


def test_a_launch_overlaps_only_the_one_before_it_on_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a lane waited for another, the next kernel must not begin before both have ended."""
    plan = load_plan("nano-batch", LLAMA, 512)
    steps = unroll(plan, LLAMA, 3)
    streams, overlaps = run(monkeypatch, steps, lanes_of(plan))
    for lane in range(len(plan.streams)):
        own = [index for index, step in enumerate(steps) if step.stream == lane]
        for before, after in pairwise(own):
            alone = streams.launched[after] == streams.launched[before] | {before}
            assert overlaps[after] == alone


class CaptureDriver:
    """Answers of the driver to a capture; graphs that are there now, by what they are."""

    def __init__(self, end: int = 0, instantiate: int = 0) -> None:
        self.capturing = False
        self.there: list[str] = []
        self._end, self._instantiate = end, instantiate
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def cuStreamBeginCapture(self, stream: int, _mode: int) -> Any:  # noqa: N802
        assert stream == ORIGIN
        self.capturing = True
        return (status(0),)

    def cuStreamEndCapture(self, _stream: int) -> Any:  # noqa: N802
        self.capturing = False
        if not self._end:
            self.there.append("captured")
        return status(self._end), "captured"

    def cuGraphInstantiate(self, graph: str, _flags: int) -> Any:  # noqa: N802
        assert graph in self.there
        if not self._instantiate:
            self.there.append("executable")
        return status(self._instantiate), "executable"

    def _destroy(self, graph: str) -> Any:
        self.there.remove(graph)
        return (status(0),)

    cuGraphDestroy = cuGraphExecDestroy = _destroy  # noqa: N815

    def cuMemGetInfo(self) -> Any:  # noqa: N802
        return status(0), 1 << 30, 16 << 30


class status(int):  # noqa: N801 stands for CUresult
    name = "CUDA_ERROR_OUT_OF_MEMORY"


def capture_with(driver: CaptureDriver, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> module.Graph:
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)

    def begin(_stream: int) -> None:
        assert driver.capturing
        if fails:
            raise ValueError("no kernel for this")

    return module.capture(
        [], [Lane("only", ORIGIN, 132)], ORIGIN, begin=begin, launch=lambda *_: None, finish=lambda _: None
    )


def test_a_graph_is_all_that_capture_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = CaptureDriver()
    graph = capture_with(driver, monkeypatch)
    assert (driver.capturing, driver.there) == (False, ["executable"])
    graph.free()
    graph.free()
    assert driver.there == []


@pytest.mark.parametrize("end", [0, 901])
def test_a_launch_that_fails_ends_the_capture(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    driver = CaptureDriver(end=end)
    with pytest.raises(ValueError, match="no kernel"):
        capture_with(driver, monkeypatch, fails=True)
    assert (driver.capturing, driver.there) == (False, [])


def test_too_little_memory_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = CaptureDriver(instantiate=2)
    with pytest.raises(DeviceMemoryError, match=r"1\.00 of 16\.00 GiB are free"):
        capture_with(driver, monkeypatch)
    assert (driver.capturing, driver.there) == (False, [])


def pool_of(plans: Sequence[PipelinePlan], operations: Sequence[Operation] = LLAMA) -> GraphPool:
    """With the plans themselves in place of graphs."""
    return GraphPool([(step, step) for step in step_plans(plans, operations)])  # type: ignore[misc]


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5000))
def test_every_batch_has_a_graph_of_at_most_twice_its_size(size: int) -> None:
    sizes = capacities(size)
    assert sizes[-1] == size
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= 30
    pool = pool_of([load_plan("sequential", LLAMA, size)])
    for tokens in range(1, size + 1):
        for decode_only in (False, True):
            step, graph = pool.find(tokens, tokens if decode_only else tokens - 1, 1000)
            chosen = step.plan.dense_batch_size
            assert graph is step  # type: ignore[comparison-overlap]
            assert tokens <= chosen <= max(16, 2 * tokens)
            if 128 < tokens <= 2048:
                assert chosen - tokens < 128
            kinds = {operation.rows for operation in step.operations}
            if not decode_only:
                assert Rows.PREFILL in kinds
            elif tokens <= 384:  # its graph is for 512 tokens at most
                assert Rows.PREFILL not in kinds


@pytest.mark.parametrize("operations", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_steps_that_only_decode_run_all_operations_but_those_of_prefill_chunks(operations: Sequence[Operation]) -> None:
    nano = load_plan("nano-batch", operations, 1024)
    plans = step_plans([nano, replace(nano, loads=((1024, 9),))], operations)
    names = {operation.name for operation in operations}
    assert [step.decode_only for step in plans if step.plan.name == "nano-batch"] == [False, True]
    for step in plans:
        unrolled = unroll(step.plan, step.operations, 2)
        left_out = {"prefill_attention"} if step.decode_only else set()
        assert {one.operation.name for one in unrolled} == names - left_out
        assert all(one.stop - one.start <= step.plan.dense_batch_size for one in unrolled)


@st.composite
def stored(draw: st.DrawFn) -> list[PipelinePlan]:
    """The sequential plan of an engine and plans from a store: of some sizes, each for a number of decode tokens of its
    own, which may be all."""
    most = draw(st.integers(2, 1200))
    sizes = draw(st.lists(st.integers(2, most) | st.just(most), max_size=3, unique=True))
    found = [sequential_plan(LLAMA, most)]
    for size in sizes:
        numbers = draw(st.lists(st.integers(1, size) | st.just(size), min_size=1, max_size=3, unique=True))
        for number in numbers:
            make = draw(st.sampled_from([sequential_plan, nano_batch_plan]))
            loads = [(number, draw(st.integers(1, 3000))) for _ in range(draw(st.integers(1, 3)))]
            name = f"{size}, {number}"
            found.append(replace(make(LLAMA, size), name=name, loads=tuple(loads)))
    return found


@settings(max_examples=60, deadline=None)
@given(plans=stored(), data=st.data())
def test_a_step_takes_the_plan_made_for_steps_most_like_it(plans: list[PipelinePlan], data: st.DataObject) -> None:
    most = plans[0].dense_batch_size
    pool, sizes = pool_of(plans), {*capacities(most), *(plan.dense_batch_size for plan in plans)}
    for _ in range(20):
        like = data.draw(st.sampled_from(plans))
        tokens = data.draw(st.integers(1, most) | st.just(like.dense_batch_size))
        number, seen = data.draw(st.sampled_from(like.loads or [(tokens, 1000)]))
        decodes = data.draw(st.integers(0, tokens) | st.just(tokens) | st.just(min(tokens, number)))
        keys = decodes * data.draw(st.integers(1, 3000) | st.just(seen))
        step, _graph = pool.find(tokens, decodes, keys)
        size = step.plan.dense_batch_size
        assert size == min(s for s in sizes if s >= tokens)
        only_decodes = tokens == decodes
        assert only_decodes or not step.decode_only

        def unlike(plan: PipelinePlan, decodes: int = decodes, keys: int = keys) -> float:
            def apart(own: int, context: int) -> float:
                pairs = (decodes, own), (keys, own * context)
                factors = [max(a / b, b / a) for a, b in pairs] if decodes else [math.inf]
                assume(abs(max(factors) - ALIKE) > 1e-9)  # rounding may decide
                return math.prod(factors) if max(factors) <= ALIKE else math.inf

            return min(apart(*load) for load in plan.loads)

        made = [plan for plan in plans[1:] if plan.dense_batch_size == size and unlike(plan) < math.inf]
        whole = [plan for plan in made if plan.loads[0][0] == size]
        able = whole if only_decodes else [plan for plan in made if plan.loads[0][0] != size]
        if able:
            assert unlike(step.plan) == pytest.approx(min(map(unlike, able)))
            assert step.plan in [replace(plan, streams=step.plan.streams) for plan in able]
        else:
            assert (step.plan.name, step.plan.loads) == ("sequential", ())
        if only_decodes and size <= SHORT:
            assert step.decode_only


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2, 3000), data=st.data())
def test_a_plan_for_any_step_serves_every_step_of_its_size(size: int, data: st.DataObject) -> None:
    nano = nano_batch_plan(LLAMA, size)
    pool, smaller = pool_of([nano]), [*capacities(size)][-2:-1]
    for tokens in {size, (smaller[0] if smaller else 0) + 1}:
        for decodes in {0, tokens, data.draw(st.integers(0, tokens))}:
            assert pool.find(tokens, decodes, 1000 * decodes)[0] == StepPlan(nano, LLAMA)
    for tokens in smaller:
        assert pool.find(tokens, 0, 0)[0].plan.name == "sequential"


def test_a_stored_plan_for_fewer_tokens_makes_a_graph_of_its_own() -> None:
    own = replace(nano_batch_plan(LLAMA, 1000), loads=((300, 100),))
    pool = pool_of([sequential_plan(LLAMA, 2048), own])
    for decodes, name in ((300, "nano-batch"), (215, "nano-batch"), (419, "nano-batch"), (213, None), (421, None)):
        assert pool.find(1000, decodes, 100 * decodes)[0].plan.name == (name or "sequential")
    assert pool.find(897, 300, 30000)[0].plan == own
    for tokens in (896, 1001):  # of other sizes
        step, _ = pool.find(tokens, 300, 30000)
        assert (step.plan.name, step.plan.dense_batch_size - tokens) == ("sequential", 0 if tokens == 896 else 23)


def test_how_much_there_is_to_read_counts_as_well_as_for_how_many() -> None:
    """Many short sequences are not like as many long ones: their attention is over before what it should lie beside."""
    own = replace(nano_batch_plan(LLAMA, 2048), loads=((700, 1000),))
    pool = pool_of([sequential_plan(LLAMA, 2048), own])
    for context, name in ((1000, "nano-batch"), (720, "nano-batch"), (1390, "nano-batch"), (700, None), (1500, None)):
        assert pool.find(2048, 700, 700 * context)[0].plan.name == (name or "sequential")
    assert pool.find(2048, 900, 700 * 1000)[0].plan == own
    assert pool.find(2048, 1100, 700 * 1000)[0].plan.name == "sequential"


def test_a_sequential_plan_stored_for_some_decode_tokens_holds_others_off() -> None:
    nano = replace(nano_batch_plan(LLAMA, 2048), loads=((200, 100), (600, 100)))
    without = pool_of([sequential_plan(LLAMA, 2048), nano])
    assert without.find(2048, 750, 75000)[0].plan == nano
    assert without.find(2048, 180, 18000)[0].plan == nano
    assert without.find(2048, 350, 35000)[0].plan.name == "sequential"  # between its loads, and near none
    sequential = replace(sequential_plan(LLAMA, 2048), loads=((800, 100),))
    beside = pool_of([sequential_plan(LLAMA, 2048), nano, sequential])
    assert beside.find(2048, 750, 75000)[0].plan == sequential
    assert beside.find(2048, 650, 65000)[0].plan == nano


def test_plans_for_steps_with_prompts_are_not_for_steps_that_only_decode() -> None:
    """What overlaps with the products of prompts loses where there are none."""
    nano = replace(nano_batch_plan(LLAMA, 1024), loads=((900, 100),))
    pool = pool_of([sequential_plan(LLAMA, 2048), nano])
    assert pool.find(1000, 999, 99_900)[0].plan == nano
    assert pool.find(1000, 1000, 100_000)[0].plan.name == "sequential"


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16])
def test_few_sequences_that_decode_run_without_prefill_attention(tokens: int) -> None:
    """They are nearer to no decode token at all than to a full graph of them."""
    pool = pool_of([sequential_plan(LLAMA, 2048)])
    assert pool.find(tokens, tokens, 0)[0].decode_only
    assert not pool.find(tokens, tokens - 1, 0)[0].decode_only


def test_what_a_search_measured_for_steps_that_only_decode_runs_them() -> None:
    """Also where a short step has a sequential graph without prefill attention by default."""
    for size in (256, 640):
        nano = replace(nano_batch_plan(LLAMA, size), loads=((size, 100),))
        pool = pool_of([sequential_plan(LLAMA, 2048), nano])
        step, _ = pool.find(size, size, 100 * size)
        assert (step.plan.name, step.decode_only) == ("nano-batch", True)
        assert pool.find(size, size - 1, 0)[0].plan.name == "sequential"
