"""GraphPool: a few captured graphs that together serve every batch."""

from __future__ import annotations

import math
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
# A plan serves steps whose decode tokens, and the keys that they see, are within this factor of those that it was made
# for. Beyond, what it overlaps no longer takes as long as what it overlaps that with: on an H200 a plan that gains 10 %
# at its load gains 3 % at 0.6 times as many, and loses 4 % at a third.
ALIKE = 1.4


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

    def distance(self, decode_tokens: int, keys: int) -> float:
        """How unlike a step is those that the plan was made for; infinite if too much so.

        Args:
            decode_tokens: of the step.
            keys: that they see together.
        """
        own, context = self.plan.decode_tokens, self.plan.decode_context
        if own is None or decode_tokens == own == 0:
            return 0.0
        if not own or not decode_tokens:
            return math.inf
        ratios = [decode_tokens / own] + ([max(keys, 1) / (own * context)] if context else [])
        logs = [abs(math.log(ratio)) for ratio in ratios]
        return sum(logs) if max(logs) <= math.log(ALIKE) else math.inf


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
        if all(plan.decode_tokens is not None for plan in own):
            found.append(StepPlan(sequential, every))
            if size <= SHORT:
                found.append(_decode_only(sequential, every))
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

    def find(self, tokens: int, decode_tokens: int, keys: int) -> tuple[StepPlan, Graph]:
        """What serves a step of so many tokens, at most the dense batch size, of which so many decode and see so many
        keys together.

        Of the graphs with the fewest tokens to spare: the one made for steps most like this; if there is none, one for
        any step. A step that only decodes takes one for such steps first.
        """
        _, entries = self._by_size[bisect_left(self._by_size, tokens, key=lambda entry: entry[0])]
        only_decodes = tokens == decode_tokens

        def order(entry: tuple[StepPlan, Graph]) -> tuple[bool, bool, float]:
            step, _ = entry
            return not step.decode_only, step.plan.decode_tokens is None, step.distance(decode_tokens, keys)

        able = [entry for entry in entries if only_decodes or not entry[0].decode_only]
        return min((e for e in able if e[0].distance(decode_tokens, keys) < math.inf), key=order)
