"""A traced step: every nano-operation between two stamps, whose times become spans. On doubles of stamps and graphs."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plan_cases import LLAMA

from nf.executors import gpu_trace
from nf.executors.gpu_trace import capture_traced
from nf.graphs.partition import Lane
from nf.graphs.plan import nano_batch_plan, unroll
from nf.kernels.device import CudaError

ORIGIN, LAUNCH_TIME = 1, 2.5e-6
POINTER, START_NS = 1 << 40, 1 << 60  # of the stamps; of their clock
REPLAY_TIME = 0.3 * gpu_trace.WARM_SECONDS
LANES = (Lane("compute", 2, 132), Lane("memory", 3, 132))


class Card:
    """A clock that every launch advances, memory for stamps of it, and what was made and not freed."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.live = 0
        self.replays = 0
        self.launched: list[tuple[str, int]] = []
        self.fails_at = -1
        self.stamps = np.zeros(0, np.uint64)
        self.stamped: list[int] = []  # streams
        self.follows = True  # where the capture may say so

    def memory(self, num_bytes: int, _purpose: str) -> Any:
        self.live += 1
        self.stamps = np.zeros(num_bytes // 8, np.uint64)

        def download(array: Any) -> None:
            array[:] = self.stamps[: len(array)]

        return SimpleNamespace(pointer=POINTER, free=self.freed, download=download)

    def stamp(self, out: int, *, stream: int) -> None:
        assert (out - POINTER) % 8 == 0
        self.stamped.append(stream)
        self.stamps[(out - POINTER) // 8] = START_NS + round(self.clock * 1e9)

    def freed(self) -> None:
        self.live -= 1

    def launch(self, name: str, stream: int) -> None:
        if len(self.launched) == self.fails_at:
            raise CudaError("the driver answered")
        self.launched.append((name, stream))
        self.clock += LAUNCH_TIME

    def capture(self, steps: Any, lanes: Any, origin: int, *, begin: Any, launch: Any, finish: Any) -> Any:
        begin(origin)
        before = None
        for step in steps:
            launch(step, lanes[step.stream], self.follows and step.stream == before)
            before = step.stream
        finish(origin)
        self.live += 1

        def replay(_stream: int) -> None:
            self.replays += 1
            self.clock += REPLAY_TIME

        return SimpleNamespace(launch=replay, free=self.freed)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(gpu_trace, "DeviceMemory", card.memory)
    monkeypatch.setattr(gpu_trace, "capture", card.capture)
    monkeypatch.setattr(gpu_trace, "time", SimpleNamespace(perf_counter=lambda: card.clock))
    return card


def trace(card: Card) -> Any:
    def launch(step: Any, lane: Lane, pdl: bool) -> None:
        assert not pdl  # it would overlap the one before
        card.launch(step.operation.name, lane.stream)

    layers: Any = SimpleNamespace(
        begin=lambda stream: card.launch("begin", stream),
        launch=launch,
        sampled_logits=lambda stream: card.launch("logits", stream),
        sample=lambda stream: card.launch("sample", stream),
    )
    stream: Any = SimpleNamespace(handle=ORIGIN, synchronize=lambda: None)
    stamp: Any = SimpleNamespace(launch=card.stamp)
    return capture_traced(layers, unroll(nano_batch_plan(LLAMA, 64), LLAMA, 2), LANES, stream, stamp)


def test_every_launch_has_a_span_on_its_stream(card: Card) -> None:
    spans = trace(card)
    steps = unroll(nano_batch_plan(LLAMA, 64), LLAMA, 2)
    names = [f"{s.operation.name} [{s.start}, {s.stop}) layer {s.layer}" for s in steps]
    assert [span.name for span in spans] == ["embed and plan", *names, "logits", "sampling"]
    assert [span.stream for span in spans] == ["step", *(LANES[s.stream].name for s in steps), "step", "step"]
    assert [stream for _, stream in card.launched] == [ORIGIN, *(LANES[s.stream].stream for s in steps), ORIGIN, ORIGIN]
    assert [span.start_us for span in spans] == pytest.approx([2.5 * index for index in range(len(spans))])
    assert [span.duration_us for span in spans] == pytest.approx([2.5] * len(spans))
    follows = sum(one.stream == two.stream for one, two in pairwise(steps)) + 1  # sampling after the logits
    assert len(card.stamped) == 2 * len(spans) - follows
    assert set(card.stamped) == {stream for _, stream in card.launched}
    assert (card.replays, card.live) == (5, 0)  # without a pause until it has been busy for long enough, and once more


def test_there_is_room_where_no_launch_follows_another(card: Card) -> None:
    card.follows = False
    assert len(card.stamped) == 0
    spans = trace(card)
    assert len(card.stamped) == 2 * len(spans) - 1 <= len(card.stamps)


def test_a_trace_that_fails_leaves_nothing(card: Card) -> None:
    card.fails_at = 5
    with pytest.raises(CudaError):
        trace(card)
    assert (card.replays, card.live) == (0, 0)
