"""One layer cut into nano-operations: what there is to schedule, with durations and derived dependencies.

A *lane* is what nano-operations queue for: those of one lane never overlap, and a lane becomes a stream of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nf.graphs.builtin import lane_of
from nf.graphs.dependencies import Dependency, Node, direct_dependencies
from nf.models.operations import Operation, Rows
from nf.planning.profile import Cost, Profile, Sms

COMPUTE = "compute"
CHUNK = 128  # tokens; nano-batches begin and end at multiples of it

Cuts = Mapping[str, tuple[int, ...]]
"""Operation → the tokens at which it is cut, rising, without the two ends."""

CostOf = Callable[[Operation, int, Sms], Cost]
"""(operation, rows of its kind, SMs) → time and energy alone."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """A dense batch: decode rows first, prefill rows after.

    Args:
        tokens: of the dense batch.
        decode_tokens: of them.
        decode_context, prefill_context: mean tokens of context per row, as attention was profiled.
    """

    tokens: int
    decode_tokens: int
    decode_context: int = 0
    prefill_context: int = 0

    def rows(self, operation: Operation, start: int, stop: int) -> int:
        """How many of the tokens [start, stop) ``operation`` works on."""
        match operation.rows:
            case Rows.DECODE:
                return max(0, min(stop, self.decode_tokens) - start)
            case Rows.PREFILL:
                return max(0, stop - max(start, self.decode_tokens))
            case _:
                return stop - start

    def context(self, operation: Operation) -> int:
        """Context of the rows of ``operation``; 0 where it does not matter."""
        return {Rows.DECODE: self.decode_context, Rows.PREFILL: self.prefill_context, Rows.ALL: 0}[operation.rows]


def profiled_costs(profile: Profile, batch: BatchShape) -> CostOf:
    """The costs in ``profile`` for attention over the contexts of ``batch``; every one is looked up once."""
    known: dict[tuple[str, int, Sms], Cost] = {}

    def cost(operation: Operation, rows: int, sms: Sms) -> Cost:
        key = operation.name, rows, sms
        if key not in known:
            known[key] = profile.cost(*key, batch.context(operation))
        return known[key]

    return cost


@dataclass(frozen=True, slots=True)
class Task:
    """A nano-operation to be scheduled: an operation on tokens [start, stop), ``rows`` of them of its kind."""

    operation: Operation
    start: int
    stop: int
    rows: int
    lane: str
    cost: Cost  # alone on the whole GPU


@dataclass(frozen=True, slots=True)
class NanoLayer:
    """The tasks of a layer in logical order, and per task the (task, layer gap) it waits for."""

    tasks: tuple[Task, ...]
    dependencies: tuple[tuple[Dependency, ...], ...]

    @property
    def lanes(self) -> dict[str, tuple[int, ...]]:
        """Lane → its tasks, in logical order."""
        lanes: dict[str, tuple[int, ...]] = {}
        for index, task in enumerate(self.tasks):
            lanes[task.lane] = (*lanes.get(task.lane, ()), index)
        return lanes

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(task.cost.seconds for task in self.tasks)

    def load(self, lane: str) -> float:
        """Seconds that ``lane`` is busy in a layer."""
        return sum(task.cost.seconds for task in self.tasks if task.lane == lane)


def nano_layer(
    operations: Sequence[Operation],
    batch: BatchShape,
    cuts: Cuts,
    cost_of: CostOf,
    lane: Callable[[Operation], str] = lane_of,
) -> NanoLayer:
    """Cut every operation at its ``cuts`` and derive what waits for what."""
    nodes: list[Node] = []
    tasks: list[Task] = []
    for operation in operations:
        for index, (start, stop) in enumerate(pairwise((0, *cuts.get(operation.name, ()), batch.tokens))):
            nodes.append(Node(operation, index, start, stop))
            rows = batch.rows(operation, start, stop)
            tasks.append(Task(operation, start, stop, rows, lane(operation), cost_of(operation, rows, "all")))
    return NanoLayer(tuple(tasks), direct_dependencies(nodes))
