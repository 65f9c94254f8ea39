"""A plan unrolled over the layers of a model: every nano-operation once, in an order that its streams can produce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from nf.errors import PlanError
from nf.graphs.dependencies import Dependency, Node, direct_dependencies, logical_nodes
from nf.graphs.pipeline_plan import PipelinePlan
from nf.graphs.validation import check_parts
from nf.models.operations import Operation


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One nano-operation in one layer, as part of a serial order.

    Args:
        operation: what to do.
        layer: on which layer.
        start, stop: on which tokens of the dense batch, [start, stop).
        stream: index of its stream in the plan.
        depends_on: indices, in the serial order, of the steps it must wait for; those that follow from others are
            left out. All are smaller than its own.
    """

    operation: Operation
    layer: int
    start: int
    stop: int
    stream: int
    depends_on: tuple[int, ...]


def unroll(
    plan: PipelinePlan, operations: Sequence[Operation], num_layers: int, interleave: Random | None = None
) -> tuple[LayerStep, ...]:
    """A serial order of all nano-operations that respects the order of every stream and every dependency.

    Args:
        plan: order and place of the nano-operations of a layer.
        operations: of one layer, in logical order.
        num_layers: at least 1.
        interleave: None takes the nano-operation of the earliest round that can start, which is always the same order;
            a generator picks any that can start, and so draws one of the orders a GPU could produce.

    Raises:
        PlanError: the plan does not fit the operations, or its streams wait for each other for ever.
    """
    if num_layers < 1:
        raise PlanError("num_layers", f"must be at least 1, got {num_layers}")
    check_parts(plan, operations)
    return _Unrolling(plan, operations, num_layers).run(interleave)


def layers_to_prove(plan: PipelinePlan) -> int:
    """Layers after which a plan that has not deadlocked never will.

    A deadlock is a circle that goes through each stream at most once: S dependencies and S stretches of a stream. In
    layers, a dependency leads ahead by 0 or 1. In rounds, it may lead back by as much as the largest lag M; stretches
    make up for that, at most S · M, and each may in addition change the layer by M. So the circle spans no more than
    S · (1 + M + M) layers, and as all layers are alike it can be found among the first ones.
    """
    return len(plan.streams) * (1 + 2 * plan.max_lag) + 1


def cross_stream_waits(steps: Sequence[LayerStep]) -> tuple[tuple[int, ...], ...]:
    """Per step, the steps of *other* streams it must explicitly wait for: the events a GPU needs.

    Left out are dependencies that hold anyway, because a stream runs in order and has already waited for that step or
    a later one of the same stream.

    Args:
        steps: from ``unroll``.

    Returns:
        For each step, indices into ``steps``, latest first.
    """
    num_streams = max((step.stream for step in steps), default=-1) + 1
    # finished[i][s]: the latest step of stream s that is known to be over when step i is (a vector clock).
    finished: list[list[int]] = []
    latest: list[list[int]] = [[-1] * num_streams for _ in range(num_streams)]
    waits: list[tuple[int, ...]] = []
    for index, step in enumerate(steps):
        known = latest[step.stream].copy()
        needed = []
        for other in sorted(step.depends_on, reverse=True):
            if other > known[steps[other].stream]:
                needed.append(other)
                known = [max(a, b) for a, b in zip(known, finished[other], strict=True)]
        known[step.stream] = index
        finished.append(known)
        latest[step.stream] = known
        waits.append(tuple(needed))
    return tuple(waits)


Place = tuple[int, int]
"""(node, layer)"""


class _Unrolling:
    """The queues of all streams over all rounds, and what has been taken from them so far."""

    def __init__(self, plan: PipelinePlan, operations: Sequence[Operation], num_layers: int) -> None:
        self.plan = plan
        self.nodes: tuple[Node, ...] = logical_nodes(plan, operations)
        self.dependencies: tuple[tuple[Dependency, ...], ...] = direct_dependencies(self.nodes)
        index = {(node.operation.name, node.nano_batch): i for i, node in enumerate(self.nodes)}
        self.queues: list[list[tuple[int, Place]]] = [
            [
                (round_, (index[item.operation, item.nano_batch], round_ - item.lag))
                for round_ in range(num_layers + plan.max_lag)
                for item in stream.nano_operations
                if 0 <= round_ - item.lag < num_layers
            ]
            for stream in plan.streams
        ]
        self.heads = [0] * len(plan.streams)
        self.done: dict[Place, int] = {}  # → index in the serial order

    def run(self, interleave: Random | None) -> tuple[LayerStep, ...]:
        steps: list[LayerStep] = []
        while waiting := [s for s, queue in enumerate(self.queues) if self.heads[s] < len(queue)]:
            ready = [s for s in waiting if self.missing(s) is None]
            if not ready:
                raise self.deadlock(waiting[0])
            s = interleave.choice(ready) if interleave else min(ready, key=lambda s: self.queues[s][self.heads[s]][0])
            place = self.head(s)
            node = self.nodes[place[0]]
            depends_on = tuple(sorted(self.done[other] for other in self.needs(place)))
            steps.append(LayerStep(node.operation, place[1], node.start, node.stop, s, depends_on))
            self.done[place] = len(self.done)
            self.heads[s] += 1
        return tuple(steps)

    def head(self, stream: int) -> Place:
        return self.queues[stream][self.heads[stream]][1]

    def needs(self, place: Place) -> list[Place]:
        node, layer = place
        return [(other, layer - gap) for other, gap in self.dependencies[node] if layer >= gap]

    def missing(self, stream: int) -> Place | None:
        """The first dependency of the stream's next nano-operation that is not done."""
        return next((place for place in self.needs(self.head(stream)) if place not in self.done), None)

    def deadlock(self, stream: int) -> PlanError:
        """Follow who waits for whom from ``stream`` until the circle closes, and tell it."""
        owner = {place: s for s, queue in enumerate(self.queues) for _, place in queue}
        path: list[int] = []
        while stream not in path:
            path.append(stream)
            missing = self.missing(stream)
            assert missing is not None  # all streams are blocked
            stream = owner[missing]
        circle = path[path.index(stream) :]
        if len(circle) == 1:
            missing = self.missing(stream)
            assert missing is not None
            return PlanError(
                f"streams[{stream}]",
                f"{self.tell(self.head(stream))} waits for {self.tell(missing)}, which the stream runs later",
            )
        links = [self.link(s, then) for s, then in zip(circle, [*circle[1:], circle[0]], strict=True)]
        return PlanError("streams", f"they wait for each other for ever: {'; '.join(links)}")

    def link(self, stream: int, then: int) -> str:
        """What the head of ``stream`` waits for, and behind which head of stream ``then`` that stands."""
        missing = self.missing(stream)
        assert missing is not None
        text = f"{self.tell(self.head(stream))} waits for {self.tell(missing)}"
        if missing == self.head(then):
            return text
        return f'{text}, which stream "{self.plan.streams[then].name}" runs after {self.tell(self.head(then))}'

    def tell(self, place: Place) -> str:
        node = self.nodes[place[0]]
        return f"{node.operation.name} of nano-batch {node.nano_batch} in layer {place[1]}"
