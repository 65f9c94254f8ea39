"""A step on the GPU with every nano-operation timed: a graph of its own, with events between the launches.

The events keep a kernel from starting before the one before it has ended, so a traced step takes a little longer than
the same step untraced. It is replayed without a pause until the clocks have settled, and the last replay is told: after
a pause as short as making the graph the clocks are above what the card's power allows for long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from nf.executors.gpu_layers import Layers
from nf.executors.trace import Span
from nf.graphs.capture import capture
from nf.graphs.partition import Lane
from nf.graphs.plan import LayerStep
from nf.kernels.device import Event, Stream

WARM_SECONDS = 1.0  # clocks follow power within a few hundred milliseconds


def capture_traced(layers: Layers, steps: Sequence[LayerStep], lanes: Sequence[Lane], stream: Stream) -> list[Span]:
    """Replay the step whose inputs are on the device for WARM_SECONDS, and say when each nano-operation ran at last."""
    with ExitStack() as undo:
        return _replay_timed(layers, steps, lanes, stream, undo)


def _replay_timed(
    layers: Layers, steps: Sequence[LayerStep], lanes: Sequence[Lane], stream: Stream, undo: ExitStack
) -> list[Span]:
    marks: list[tuple[str, str, Event, Event]] = []

    def event() -> Event:
        made = Event(timing=True)
        undo.callback(made.free)
        return made

    def timed(lane: str, name: str, on: int) -> Event:
        start, end = event(), event()
        start.record_in_graph(on)
        marks.append((lane, name, start, end))
        return end

    def begin(on: int) -> None:
        end = timed("step", "embed and plan", on)
        layers.begin(on)
        end.record_in_graph(on)

    def launch(step: LayerStep, lane: Lane, _pdl: bool) -> None:
        name = f"{step.operation.name} [{step.start}, {step.stop}) layer {step.layer}"
        end = timed(lane.name, name, lane.stream)
        layers.launch(step, lane, False)
        end.record_in_graph(lane.stream)

    def finish(on: int) -> None:
        for name, launch_part in (("logits", layers.sampled_logits), ("sampling", layers.sample)):
            end = timed("step", name, on)
            launch_part(on)
            end.record_in_graph(on)

    graph = capture(steps, lanes, stream.handle, begin=begin, launch=launch, finish=finish)
    undo.callback(graph.free)
    until = time.perf_counter() + WARM_SECONDS
    settled = False
    while not settled:
        settled = time.perf_counter() >= until
        graph.launch(stream.handle)
        stream.synchronize()
    first = marks[0][2]
    return [Span(lane, name, start.since(first) * 1e6, end.since(start) * 1e6) for lane, name, start, end in marks]
