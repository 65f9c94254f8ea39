"""Capture: the nano-operations of a plan, over all layers, as one CUDA graph.

The steps of ``unroll`` are launched in their serial order, each on its stream's lane. Where a step depends on one of
another lane, an event joins the two; within a lane the order of launches is enough. What comes before and after the
layers is launched on the lane that the graph begins and ends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nf.graphs.partition import Lane
from nf.graphs.unroll import LayerStep
from nf.kernels.device import Event, checked

LaunchStep = Callable[[LayerStep, Lane, bool], None]
"""Launches a step on a lane; the flag says whether its first kernel may start before the kernel before it on that lane
has ended (programmatic dependent launch), because nothing else has to be waited for."""

LaunchOnStream = Callable[[int], None]


class Graph:
    """An executable CUDA graph. Its kernels' operands must outlive it."""

    def __init__(self, graph: object) -> None:
        from cuda.bindings import driver

        self._graph = graph
        self.num_nodes = int(checked(driver.cuGraphGetNodes(graph, 0))[1])
        self._executable = checked(driver.cuGraphInstantiate(graph, 0))

    def launch(self, stream: int) -> None:
        """Enqueue one replay."""
        from cuda.bindings import driver

        checked(driver.cuGraphLaunch(self._executable, stream))

    def upload(self, stream: int) -> None:
        """Move to the device what the first replay would have to."""
        from cuda.bindings import driver

        checked(driver.cuGraphUpload(self._executable, stream))

    def free(self) -> None:
        """Destroy the graph; idempotent. No replay may be under way."""
        from cuda.bindings import driver

        if self._executable is not None:
            checked(driver.cuGraphExecDestroy(self._executable))
            checked(driver.cuGraphDestroy(self._graph))
            self._executable = self._graph = None


def capture(
    steps: Sequence[LayerStep],
    lanes: Sequence[Lane],
    origin: int,
    *,
    begin: LaunchOnStream,
    launch: LaunchStep,
    finish: LaunchOnStream,
) -> Graph:
    """One graph of ``begin``, all steps and ``finish``.

    Args:
        steps: as ``unroll`` orders them.
        lanes: of the plan's streams, in their order. The only lane of a plan may be ``origin`` itself.
        origin: stream that the capture begins and ends on; nothing else may use it meanwhile.
        begin, finish: launch what comes before and after the layers, on ``origin``.
        launch: launches one step.

    Raises:
        CudaError: the driver refused; no capture is left behind.
    """
    from cuda.bindings import driver

    modes = driver.CUstreamCaptureMode
    checked(driver.cuStreamBeginCapture(origin, modes.CU_STREAM_CAPTURE_MODE_RELAXED))
    try:
        begin(origin)
        _Capture(steps, lanes, origin).run(launch)
        finish(origin)
    except BaseException:
        driver.cuStreamEndCapture(origin)  # answers with the error that is on its way already
        raise
    return Graph(checked(driver.cuStreamEndCapture(origin)))


@dataclass
class _Capture:
    steps: Sequence[LayerStep]
    lanes: Sequence[Lane]
    origin: int

    def run(self, launch: LaunchStep) -> None:
        others = [lane.stream for lane in self.lanes if lane.stream != self.origin]
        events: dict[int, Event] = {}
        fork = Event()
        if others:
            fork.record(self.origin)
        for stream in others:
            fork.block(stream)
        joined = {lane.stream for lane in self.lanes if lane.stream != self.origin}  # since their last kernel
        seen: dict[tuple[int, int], int] = {}  # (lane, other lane) → latest step of the other that was waited for
        needed = self._needed_elsewhere()
        for index, step in enumerate(self.steps):
            lane = self.lanes[step.stream]
            for other in step.depends_on:
                across = step.stream, self.steps[other].stream
                if across[0] != across[1] and seen.get(across, -1) < other:
                    events[other].block(lane.stream)
                    seen[across] = other
                    joined.add(lane.stream)
            launch(step, lane, lane.stream not in joined)
            joined.discard(lane.stream)
            if index in needed:
                events[index] = Event()
                events[index].record(lane.stream)
        for stream in others:
            join = Event()
            join.record(stream)
            join.block(self.origin)
            join.free()
        for event in (fork, *events.values()):  # the graph keeps edges, not events
            event.free()

    def _needed_elsewhere(self) -> set[int]:
        """Steps that one on another lane depends on."""
        return {
            other
            for step in self.steps
            for other in step.depends_on
            if self.steps[other].stream != step.stream
        }  # fmt: skip
