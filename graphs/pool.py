"""GraphPool: a few captured graphs that together serve every batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from nf.graphs.capture import Graph
from nf.graphs.plan import PipelinePlan, sequential_plan
from nf.models.operations import Operation, Rows

SMALLEST = 16  # tokens
BLOCK = 128  # tokens; the GEMMs' tiles have as many rows, or twice as many
FINE, COARSE_BLOCKS = 2048, 4  # up to FINE tokens a graph for every block, beyond that for every fourth
SHORT = 512  # tokens of a step that takes so little time that launches without rows matter


def capacities(dense_batch_size: int) -> tuple[int, ...]:
    """Sizes to capture graphs for, the dense batch size last.

    A graph serves any smaller batch with work proportional to its tokens, but its GEMMs' tiles were chosen for the
    size it was captured for: on an H200, 640 decodes take 3.5 % less on a graph of their own than on that of 768. The
    more blocks there are the less one matters, so sizes lie farther apart; below a block they are powers of two.
    """
    sizes = {SMALLEST, SMALLEST * 2, SMALLEST * 4}
    sizes |= {*range(BLOCK, FINE, BLOCK), *range(FINE, dense_batch_size, BLOCK * COARSE_BLOCKS)}
    return (*sorted(size for size in sizes if size < dense_batch_size), dense_batch_size)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a graph is captured of.

    Args:
        plan: its dense batch size is the most tokens of a step.
        operations: of one layer, those that the plan runs.
    """

    plan: PipelinePlan
    operations: tuple[Operation, ...]

    @property
    def decode_only(self) -> bool:
        """Whether a step with a prefill chunk must not use it."""
        return all(operation.rows is not Rows.PREFILL for operation in self.operations)


def step_plans(plans: Sequence[PipelinePlan], operations: Sequence[Operation]) -> tuple[StepPlan, ...]:
    """The plans to capture graphs of, smallest first: ``plans`` for the steps they were made for, the sequential one
    for all others.

    In a short step it matters that an operation without rows is launched and keeps the next one from starting early. So
    steps of few tokens that only decode have a sequential graph of their own, without what only prefill chunks need,
    and so has every plan that was made for such steps.

    Args:
        plans: valid ones; the first one's dense batch size is the most tokens of any step.
        operations: of one layer of the model.
    """
    every = tuple(operations)
    most = plans[0].dense_batch_size
    found = []
    for size in sorted({*capacities(most), *(plan.dense_batch_size for plan in plans)}):
        sequential = sequential_plan(every, size)
        own = [plan for plan in plans if plan.dense_batch_size == size]
        own = [plan for plan in own if plan.decode_tokens is not None or plan.streams != sequential.streams]
        made_for = {plan.decode_tokens for plan in own}
        if made_for.isdisjoint({None, 0}):
            found.append(StepPlan(replace(sequential, decode_tokens=0), every))
        if size <= SHORT and made_for.isdisjoint({None, size}):
            found.append(_decode_only(replace(sequential, decode_tokens=size), every))
        found += [_decode_only(p, every) if p.decode_tokens == size else StepPlan(p, every) for p in own]
    return tuple(found)


def _decode_only(plan: PipelinePlan, operations: Sequence[Operation]) -> StepPlan:
    """The plan without what only prefill chunks need."""
    left = tuple(operation for operation in operations if operation.rows is not Rows.PREFILL)
    names = {operation.name for operation in left}
    streams = (
        replace(stream, nano_operations=tuple(item for item in stream.nano_operations if item.operation in names))
        for stream in plan.streams
    )
    return StepPlan(replace(plan, streams=tuple(stream for stream in streams if stream.nano_operations)), left)


class GraphPool:
    """Graphs by the steps they serve; who made them frees them.

    Args:
        graphs: of each of ``step_plans``.
    """

    def __init__(self, graphs: Sequence[tuple[StepPlan, Graph]]) -> None:
        by_size = groupby(graphs, key=lambda entry: entry[0].plan.dense_batch_size)
        self._by_size = [(size, tuple(entries)) for size, entries in by_size]

    def find(self, tokens: int, decode_tokens: int) -> tuple[StepPlan, Graph]:
        """What serves a step of so many tokens, at most the dense batch size, of which so many decode.

        Of the graphs with the fewest tokens to spare, the one made for the nearest number of decode tokens; a plan for
        any step stands for 0, as the sequential one does. A step that only decodes takes one for such steps first: with
        few tokens it would be nearer to 0.
        """
        _, entries = self._by_size[bisect_left(self._by_size, tokens, key=lambda entry: entry[0])]

        def distance(entry: tuple[StepPlan, Graph]) -> tuple[bool, int]:
            step, _ = entry
            return not step.decode_only, abs((step.plan.decode_tokens or 0) - decode_tokens)

        return min((e for e in entries if tokens == decode_tokens or not e[0].decode_only), key=distance)
