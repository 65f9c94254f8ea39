"""Capture: the nano-operations of a plan, over all layers, as one CUDA graph.

The steps of ``unroll`` are launched in their serial order, each on its stream's lane. Where a step depends on one of
another lane, an event joins the two; within a lane the order of launches is enough. What comes before and after the
layers is launched on the lane that the graph begins and ends on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain

from nf.graphs.partition import Lane
from nf.graphs.unroll import LayerStep, cross_stream_waits
from nf.kernels.device import Event, checked

LaunchStep = Callable[[LayerStep, Lane, bool], None]
"""Launches a step on a lane; the flag says whether its first kernel may start before the kernel before it on that lane
has ended (programmatic dependent launch), because nothing else has to be waited for."""

LaunchOnStream = Callable[[int], None]

_CAPTURING = threading.Lock()  # executors share lanes, and those of two engines may be made at the same time


class Graph:
    """An executable CUDA graph, made of what was captured, which it destroys. Its kernels' operands must outlive it.

    Raises:
        CudaError: the driver cannot make it, for lack of memory for one.
    """

    def __init__(self, captured: object) -> None:
        from cuda.bindings import driver

        try:
            self._executable = checked(driver.cuGraphInstantiate(captured, 0))
        finally:
            driver.cuGraphDestroy(captured)  # the executable is a copy

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
            self._executable = None


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
        CudaError: the driver refused; neither a capture nor a graph is left behind.
    """
    from cuda.bindings import driver

    modes = driver.CUstreamCaptureMode
    with _CAPTURING:
        checked(driver.cuStreamBeginCapture(origin, modes.CU_STREAM_CAPTURE_MODE_RELAXED))
        try:
            begin(origin)
            _launch_all(steps, lanes, origin, launch)
            finish(origin)
        except BaseException:
            status, captured = driver.cuStreamEndCapture(origin)  # its error, if any, follows from that on its way
            if not int(status):
                driver.cuGraphDestroy(captured)
            raise
        captured = checked(driver.cuStreamEndCapture(origin))
    return Graph(captured)


def _launch_all(steps: Sequence[LayerStep], lanes: Sequence[Lane], origin: int, launch: LaunchStep) -> None:
    """Fork from ``origin`` to the lanes, launch every step once what it waits for has been recorded, and join."""
    others = [lane.stream for lane in lanes if lane.stream != origin]
    with ExitStack() as events:  # a graph keeps their edges, not them

        def mark(stream: int) -> Event:
            event = Event()
            events.callback(event.free)
            event.record(stream)
            return event

        if others:
            fork = mark(origin)
            for stream in others:
                fork.block(stream)
        waits = cross_stream_waits(steps)
        needed = set(chain.from_iterable(waits))
        marks: dict[int, Event] = {}
        waited = set(others)  # lanes that wait for something since their last kernel
        for index, step in enumerate(steps):
            lane = lanes[step.stream]
            for other in waits[index]:
                marks[other].block(lane.stream)
                waited.add(lane.stream)
            launch(step, lane, lane.stream not in waited)
            waited.discard(lane.stream)
            if index in needed:
                marks[index] = mark(lane.stream)
        for stream in others:
            mark(stream).block(origin)
