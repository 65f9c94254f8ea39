"""GraphPool: a few captured graphs that together serve every batch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from nf.graphs.capture import Graph
from nf.graphs.plan import PipelinePlan, sequential_plan
from nf.models.operations import Operation, Rows

SMALLEST = 16  # tokens
BLOCK = 128  # tokens; the GEMMs' tiles have as many rows, or twice as many
FINE, COARSE_BLOCKS = 2048, 4  # up to FINE tokens a graph for every block, beyond that for every fourth
SHORT = 512  # tokens of a step that takes so little time that launches without rows matter
# A plan serves steps whose decode tokens, and the keys that they see, are within this factor of those of its loads.
# Farther off, what it overlaps no longer takes as long as what it overlaps that with.
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

    @property
    def work(self) -> Hashable:
        """What is captured: one graph serves all that have it in common, whatever steps they are for."""
        return self.plan.dense_batch_size, self.plan.nano_batches, self.plan.streams, self.operations


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
        own = [plan for plan in own if plan.loads or plan.streams != sequential.streams]
        if all(plan.loads for plan in own):
            found.append(StepPlan(sequential, every))
            if size <= SHORT:
                found.append(_decode_only(sequential, every))
        for plan in own:
            decodes = bool(plan.loads) and all(decode_tokens == size for decode_tokens, _ in plan.loads)
            found.append(_decode_only(plan, every) if decodes else StepPlan(plan, every))
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


Entry = tuple[StepPlan, Graph]


class _Graphs:
    """Graphs of one size: each for steps like its loads, one for any step, or none."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        loads = [(load, entry) for entry in entries for load in entry[0].plan.loads]
        self._owners = [entry for _, entry in loads]
        # [loads, 2] logarithms of decode tokens and of the keys that they see together
        self._places = np.log([(tokens, tokens * keys) for (tokens, keys), _ in loads]).reshape(-1, 2)
        self.any = next((entry for entry in entries if not entry[0].plan.loads), None)

    def find(self, decode_tokens: int, keys: int) -> Entry | None:
        """That of the load nearest to such a step, by the sum of both ratios' logarithms."""
        if self._owners and decode_tokens:
            apart = np.abs(self._places - np.log((decode_tokens, max(keys, 1))))
            apart[apart.max(axis=1) > math.log(ALIKE)] = math.inf
            distances = apart.sum(axis=1)
            nearest = int(distances.argmin())
            if distances[nearest] < math.inf:
                return self._owners[nearest]
        return self.any


class GraphPool:
    """Graphs by the steps they serve; who made them frees them.

    Args:
        graphs: of each of ``step_plans``.
    """

    def __init__(self, graphs: Sequence[Entry]) -> None:
        self._by_size: list[tuple[int, _Graphs, _Graphs]] = []
        for size, group in groupby(graphs, key=lambda entry: entry[0].plan.dense_batch_size):
            entries = list(group)
            general = _Graphs([entry for entry in entries if not entry[0].decode_only])
            self._by_size.append((size, general, _Graphs([entry for entry in entries if entry[0].decode_only])))

    def find(self, tokens: int, decode_tokens: int, keys: int) -> Entry:
        """What serves a step of so many tokens, at most the dense batch size, of which so many decode and see so many
        keys together.

        Of the graphs with the fewest tokens to spare: the one with the load most like this step; if none is near, the
        one for any step. A step that only decodes takes one for such steps, else the one for any step: what is won by
        overlapping with the products of prompts is lost where there are none.
        """
        _, general, decoding = self._by_size[bisect_left(self._by_size, tokens, key=lambda graphs: graphs[0])]
        if tokens == decode_tokens:
            found = decoding.find(decode_tokens, keys) or general.any
        else:
            found = general.find(decode_tokens, keys)
        assert found is not None, "every size has a graph for any step"
        return found
