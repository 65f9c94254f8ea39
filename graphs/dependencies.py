"""Which nano-operation must wait for which: derived from what operations read and write, never written by hand.

Two nano-operations depend on each other only if their operations do and their token ranges intersect (NanoFlow, arXiv
2408.12757). Operations do if one writes a buffer that the other reads or writes, and they touch rows of
the same kind. The one that comes first in logical order (layer by layer, in the order of declaration) goes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from nf.graphs.pipeline_plan import PipelinePlan
from nf.models.operations import PER_LAYER_BUFFERS, Operation


@dataclass(frozen=True, slots=True)
class Node:
    """An operation on one nano-batch, tokens [start, stop), in some layer."""

    operation: Operation
    nano_batch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Access:
    """Rows [start, stop) of a buffer that a node reads or writes."""

    buffer: str
    start: int
    stop: int
    writes: bool


Dependency = tuple[int, int]
"""(node, layer gap): that node in the same layer (0) or in the layer before (1)."""


def logical_nodes(plan: PipelinePlan, operations: Sequence[Operation]) -> tuple[Node, ...]:
    """The nodes of one layer in logical order: as declared, and by token range within an operation."""
    order = {operation.name: index for index, operation in enumerate(operations)}
    items = [item for stream in plan.streams for item in stream.nano_operations]
    nodes = [Node(operations[order[i.operation]], i.nano_batch, *plan.nano_batches[i.nano_batch]) for i in items]
    return tuple(sorted(nodes, key=lambda node: (order[node.operation.name], node.start)))


def direct_dependencies(nodes: Sequence[Node]) -> tuple[tuple[Dependency, ...], ...]:
    """Per node, what it waits for; a dependency that follows from others (the transitive ones) is left out.

    Two layers are enough to know all of it. If (a, l) and (b, l + 2) conflict, the buffer is shared by all layers and
    one of them writes it; that one also conflicts with itself in layer l + 1, so there is a way through layer l + 1.
    """
    n = len(nodes)
    accesses = [tuple(_accesses(node)) for node in nodes]
    same_layer = [[i for i in range(j) if _conflict(nodes, accesses, i, j, same_layer=True)] for j in range(n)]
    layer_before = [[i for i in range(n) if _conflict(nodes, accesses, i, j, same_layer=False)] for j in range(n)]

    # Sets of nodes as bit masks. What comes before a node in its own layer, bit i: node i …
    before: list[int] = []
    for j in range(n):
        before.append(_union(1 << i | before[i] for i in same_layer[j]))
    # … and over two layers, bit i: node i of the layer before, bit n + i: node i of the same layer.
    before_in_two: list[int] = []
    direct: list[tuple[Dependency, ...]] = []
    for j in range(n):
        kept: list[Dependency] = []
        covered = 0
        for i in reversed(same_layer[j]):  # from the latest, which may imply the others, to the earliest
            if not covered >> n + i & 1:
                kept.append((i, 0))
                covered |= 1 << n + i | before_in_two[i]
        for i in reversed(layer_before[j]):
            if not covered >> i & 1:
                kept.append((i, 1))
                covered |= 1 << i | before[i]
        before_in_two.append(covered)
        direct.append(tuple(kept))
    return tuple(direct)


def _union(masks: Iterable[int]) -> int:
    return reduce(or_, masks, 0)


def _accesses(node: Node) -> Iterator[Access]:
    for buffer in node.operation.reads:
        yield Access(buffer, node.start, node.stop, writes=False)
    for buffer in node.operation.reads_before:
        yield Access(buffer, 0, node.stop, writes=False)
    for buffer in node.operation.writes:
        yield Access(buffer, node.start, node.stop, writes=True)


def _conflict(
    nodes: Sequence[Node], accesses: Sequence[tuple[Access, ...]], i: int, j: int, *, same_layer: bool
) -> bool:
    if not nodes[i].operation.rows.meets(nodes[j].operation.rows):
        return False
    return any(
        a.buffer == b.buffer
        and (a.writes or b.writes)
        and a.start < b.stop
        and b.start < a.stop
        and (same_layer or a.buffer not in PER_LAYER_BUFFERS)
        for a in accesses[i]
        for b in accesses[j]
    )
