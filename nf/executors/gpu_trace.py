"""A step on the GPU with every nano-operation timed: a graph of its own, with time stamps between the launches.

The stamps are small kernels. Events in the graph would mark the same moments, but they hold up kernels of other lanes:
a step of some 62 ms on partitions took 84 with them, and the overlap was gone. Stamps keep a kernel from starting
before the one before it on its lane has ended, and take time themselves. The step is replayed without a pause until the
clocks have settled, and the last replay is told: after a pause as short as making the graph the clocks are above what
the card's power allows for long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from nf.executors.gpu_layers import Layers
from nf.executors.trace import Span
from nf.graphs.capture import capture
from nf.graphs.partition import Lane
from nf.graphs.plan import LayerStep
from nf.kernels.device import DeviceMemory, Stream
from nf.kernels.stamp import STAMP_BYTES, Stamp

WARM_SECONDS = 1.0  # clocks follow power within a few hundred milliseconds
AROUND = 3  # spans that stand around the layers


@dataclass(slots=True)
class _Stamps:
    """Where the stamps of a graph go, and which of them are a span's."""

    stamp: Stamp
    memory: DeviceMemory
    count: int = 0
    latest: dict[int, int] = field(default_factory=dict)  # of each stream
    spans: list[tuple[str, str, int, int]] = field(default_factory=list)  # lane, name, first and last stamp

    def timed(self, lane: str, name: str, stream: int, launch: Callable[[], None], *, follows: bool = False) -> None:
        """Launch something between two stamps; ``follows``: the last one of this stream is its first, so that what lies
        between both is counted as its own time."""
        first = self.latest[stream] if follows else self._stamp(stream)
        launch()
        self.latest[stream] = self._stamp(stream)
        self.spans.append((lane, name, first, self.latest[stream]))

    def _stamp(self, stream: int) -> int:
        number = self.count
        self.stamp.launch(self.memory.pointer + number * STAMP_BYTES, stream=stream)
        self.count += 1
        return number

    def read(self) -> list[Span]:
        """What the last replay wrote, from its first stamp on."""
        moments = np.empty(self.count, np.uint64)
        self.memory.download(moments)
        us = ((moments - moments[0]) / 1e3).tolist()
        return [Span(lane, name, us[first], us[last] - us[first]) for lane, name, first, last in self.spans]


def capture_traced(
    layers: Layers, steps: Sequence[LayerStep], lanes: Sequence[Lane], stream: Stream, stamp: Stamp
) -> list[Span]:
    """Replay the step whose inputs are on the device for WARM_SECONDS, and say when each nano-operation ran at last."""
    with ExitStack() as undo:
        memory = DeviceMemory(2 * (len(steps) + AROUND) * STAMP_BYTES, "a step's time stamps")
        undo.callback(memory.free)
        stamps = _Stamps(stamp, memory)

        def begin(on: int) -> None:
            stamps.timed("step", "embed and plan", on, lambda: layers.begin(on))

        def launch(step: LayerStep, lane: Lane, follows: bool) -> None:
            name = f"{step.operation.name} [{step.start}, {step.stop}) layer {step.layer}"
            stamps.timed(lane.name, name, lane.stream, lambda: layers.launch(step, lane, False), follows=follows)

        def finish(on: int) -> None:
            stamps.timed("step", "logits", on, lambda: layers.sampled_logits(on))
            stamps.timed("step", "sampling", on, lambda: layers.sample(on), follows=True)

        graph = capture(steps, lanes, stream.handle, begin=begin, launch=launch, finish=finish)
        undo.callback(graph.free)
        until = time.perf_counter() + WARM_SECONDS
        settled = False
        while not settled:
            settled = time.perf_counter() >= until
            graph.launch(stream.handle)
            stream.synchronize()
        return stamps.read()
