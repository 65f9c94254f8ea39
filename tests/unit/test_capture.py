"""What capture records, on a double of streams and events that keeps, for every launch, what it is ordered after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import LLAMA, MIXTRAL, must_precede

from nf.graphs import capture as module
from nf.graphs.partition import Lane
from nf.graphs.plan import LayerStep, PipelinePlan, load_plan, unroll
from nf.graphs.pool import GraphPool, capacities

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


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5000))
def test_every_batch_has_a_graph_of_at_most_twice_its_size(size: int) -> None:
    sizes = capacities(size)
    assert sizes[-1] == size
    assert list(sizes) == sorted(set(sizes))
    pool = GraphPool({capacity: _Named(capacity) for capacity in sizes})  # type: ignore[misc]
    for tokens in range(1, size + 1):
        chosen = pool.for_tokens(tokens).capacity  # type: ignore[attr-defined]
        assert tokens <= chosen
        assert chosen <= max(16, 2 * tokens)
    assert len(sizes) <= 25


class _Named:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
