"""What capture records, on a double of streams and events that keeps, for every launch, what it is ordered after."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import count, pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import LLAMA, MIXTRAL, must_precede

from nf.graphs import capture as module
from nf.graphs.partition import Lane
from nf.graphs.plan import LayerStep, PipelinePlan, load_plan, unroll
from nf.graphs.pool import GraphPool, capacities, step_plans
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


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5000))
def test_every_batch_has_a_graph_of_at_most_twice_its_size(size: int) -> None:
    sizes = capacities(size)
    assert sizes[-1] == size
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= 30
    plan = load_plan("sequential", LLAMA, size)
    pool = GraphPool([(step, step) for step in step_plans(plan, LLAMA)])  # type: ignore[misc]
    for tokens in range(1, size + 1):
        for decode_only in (False, True):
            step, graph = pool.find(tokens, decode_only)
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
    plans = step_plans(load_plan("nano-batch", operations, 1024), operations)
    names = {operation.name for operation in operations}
    for step in plans:
        unrolled = unroll(step.plan, step.operations, 2)
        left_out = {"prefill_attention"} if step.decode_only else set()
        assert {one.operation.name for one in unrolled} == names - left_out
        assert all(one.stop - one.start <= step.plan.dense_batch_size for one in unrolled)
    assert plans[-1].plan.name == "nano-batch"
