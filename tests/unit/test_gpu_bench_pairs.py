"""Two nano-operations side by side in the bench without a GPU: each at the pace it has while both run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from gpu_bench_double import CAPTURED, KERNEL_SECONDS, PACE, Event, Graph, Time, bench, install

from nf.planning import steady_replays


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(monkeypatch)
    yield
    assert Graph.live == 0


def test_two_side_by_side_are_each_timed_while_both_run() -> None:
    own = bench()
    slow = own._streams[1].handle
    PACE[slow] = 3.0
    pair = own.co_run(("o_proj", 32, 108, 0), ("decode_attention", 32, 24, 48))
    assert pair.first.seconds == pytest.approx(KERNEL_SECONDS)
    assert pair.second.seconds == pytest.approx(3 * KERNEL_SECONDS)
    assert (pair.first.sms, pair.second.sms, pair.watts) == (108, 24, 500.0)
    assert [[lane.sms for lane in graph.lanes] for graph in CAPTURED[1::2]] == [[108], [24]]
    assert own._lane_of(24) is CAPTURED[-1].lanes[0]  # partitions are made once
    assert own._lane_of(108) is CAPTURED[1].lanes[0]
    own.close()


PAIR = ("o_proj", 32, "all", 0), ("decode_attention", 32, "all", 48)


def slow_beside(monkeypatch: pytest.MonkeyPatch, stream: int, pace: float) -> None:
    """What a stream runs takes longer once something runs beside it."""
    replay = steady_replays._replay

    def slower(*values: Any) -> Any:
        PACE[stream] = pace
        return replay(*values)

    monkeypatch.setattr(steady_replays, "_replay", slower)


@pytest.mark.parametrize("pace", [1.0, 3.0])
def test_both_sides_have_enough_enqueued_and_no_more_until_the_same_moment(
    pace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bench(run=0.5)
    slow_beside(monkeypatch, own._streams[0].handle, pace)
    own.co_run(*PAIR)
    own.close()
    for graph, slower in zip(CAPTURED[1::2], (pace, 1.0), strict=True):
        alone = KERNEL_SECONDS * len(graph.kernels)
        depth = math.ceil(steady_replays.AHEAD_SECONDS / alone)
        assert depth > 2
        assert graph.most == depth
        assert graph.waited == 0
        late = graph.ends[-1] - graph.ends[0] + slower * alone - (0.5 + steady_replays.WARM_SECONDS)
        assert 0 < late < (depth + 1) * slower * alone  # what is enqueued when time is up


def test_a_side_that_is_slow_beside_the_other_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the three replays that tell its pace."""
    own = bench()
    slow_beside(monkeypatch, own._streams[0].handle, 47.0)  # 3 · 0.15 s, far more than it is measured for
    pair = own.co_run(*PAIR)
    own.close()
    assert pair.first.seconds == pytest.approx(47 * KERNEL_SECONDS)
    assert pair.second.seconds == pytest.approx(KERNEL_SECONDS)
    slow, other = CAPTURED[1::2]
    assert slow.most == math.ceil(steady_replays.AHEAD_SECONDS / (KERNEL_SECONDS * len(slow.kernels)))
    assert other.waited == 0
    assert other.ends[-1] == pytest.approx(slow.ends[2], abs=steady_replays.AHEAD_SECONDS + 5e-3)


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    own = bench()
    slow_beside(monkeypatch, own._streams[0].handle, 1e6)
    pair = own.co_run(*PAIR)
    own.close()
    other = CAPTURED[3]
    taken = 0.01 + steady_replays.WARM_SECONDS + steady_replays.PATIENCE_SECONDS
    assert other.ends[-1] - other.ends[0] == pytest.approx(taken, abs=steady_replays.AHEAD_SECONDS + 5e-3)
    assert pair.first.seconds > 100 * KERNEL_SECONDS


@pytest.mark.parametrize("often", [1, 2])
@pytest.mark.parametrize("event", [1, 5])
def test_what_is_timed_while_the_host_is_held_up_is_timed_again(
    often: int, event: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay seems to take long if the host comes to note its end, or the beginning of all, only much later."""
    own, replay, record, waiting = bench(), steady_replays._replay, Event.record, list[int]()

    def replay_held_up(*values: Any) -> Any:
        nonlocal often
        if often > 0:
            often -= 1
            waiting.append(event)
        return replay(*values)

    def record_late(of: Event, stream: int) -> None:
        if waiting:
            waiting[0] -= 1
            if waiting[0] == 0:
                waiting.clear()
                Time.now += 1.0
        record(of, stream)

    monkeypatch.setattr(steady_replays, "_replay", replay_held_up)
    monkeypatch.setattr(Event, "record", record_late)
    assert own.solo(("o_proj", 32, "all", 0)).seconds == pytest.approx(KERNEL_SECONDS)
    assert (often, waiting) == (0, [])
    own.close()


def test_a_host_that_is_always_held_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    own, held_up, replay = bench(), [0.5, 0.2, 0.3], steady_replays._replay

    def replay_held_up(*values: Any) -> Any:
        found = *replay(*values)[:2], held_up.pop(0)
        PACE[own._streams[0].handle] += 1.0
        return found

    monkeypatch.setattr(steady_replays, "_replay", replay_held_up)
    # Of all tries the one that the host was held up in for the shortest time.
    assert own.solo(("o_proj", 32, "all", 0)).seconds == pytest.approx(2 * KERNEL_SECONDS)
    assert held_up == []
    own.close()


def test_a_side_that_gets_nowhere_is_slow_not_as_fast_as_alone() -> None:
    own = bench()
    PACE[own._streams[0].handle] = 1e9
    pair = own.co_run(("o_proj", 32, "all", 0), ("decode_attention", 32, "all", 48))
    assert pair.first.seconds > 10 * KERNEL_SECONDS
    assert pair.second.seconds == pytest.approx(KERNEL_SECONDS)
    own.close()


@pytest.mark.parametrize(
    ("ends", "stop", "seconds"),
    [
        ([1.0, 1.1, 1.2, 1.3], 1.25, 0.1),
        ([0.0005, 1.0, 1.4], 1.1, 0.9995),  # one before all was warm
        ([0.7, 1.5], 1.1, 0.7),
        ([2.0, 3.0], 1.1, 1.1),
    ],
)
def test_the_pace_is_that_of_the_time_that_both_ran(ends: list[float], stop: float, seconds: float) -> None:
    assert steady_replays._seconds(ends, stop) == pytest.approx(seconds)
