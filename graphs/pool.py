"""GraphPool: a few captured graphs that together serve every batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

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


def step_plans(plan: PipelinePlan, operations: Sequence[Operation]) -> tuple[StepPlan, ...]:
    """The plans to capture graphs of, smallest first: ``plan`` itself for the largest batches, the sequential one for
    smaller ones, whose nano-batches would be too small to be worth it.

    In a short step it matters that an operation without rows is launched and keeps the next one from starting early, so
    where a plan for few tokens is sequential there is a second graph, for steps that only decode, without what only
    prefill chunks need.

    Args:
        operations: of one layer of the model.
    """
    every = tuple(operations)
    decode = tuple(operation for operation in every if operation.rows is not Rows.PREFILL)
    found = []
    for size in capacities(plan.dense_batch_size):
        sequential = sequential_plan(every, size)
        own = plan if size == plan.dense_batch_size else sequential
        if size <= SHORT and own.streams == sequential.streams:
            found.append(StepPlan(sequential_plan(decode, size), decode))
        found.append(StepPlan(own, every))
    return tuple(found)


class GraphPool:
    """Graphs by the steps they serve; who made them frees them.

    Args:
        graphs: of each of ``step_plans``.
    """

    def __init__(self, graphs: Sequence[tuple[StepPlan, Graph]]) -> None:
        general = {step.plan.dense_batch_size: (step, graph) for step, graph in graphs if not step.decode_only}
        decoding = general | {step.plan.dense_batch_size: (step, graph) for step, graph in graphs if step.decode_only}
        self._by_kind = {False: sorted(general.items()), True: sorted(decoding.items())}

    def find(self, tokens: int, decode_only: bool) -> tuple[StepPlan, Graph]:
        """What serves a batch of so many tokens, at most the dense batch size, with the least to spare.

        Args:
            decode_only: no token belongs to a prefill chunk.
        """
        entries = self._by_kind[decode_only]
        return entries[bisect_left(entries, tokens, key=lambda entry: entry[0])][1]
