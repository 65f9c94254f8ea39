"""GraphPool: a few captured graphs that together serve every size of batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from nf.graphs.capture import Graph
from nf.graphs.plan import PipelinePlan, sequential_plan
from nf.models.operations import Operation

SMALLEST = 16  # tokens
BLOCK = 128  # tokens; the GEMMs' tiles have as many rows, or twice as many
FINE, COARSE_BLOCKS = 2048, 4  # up to FINE tokens a graph for every block, beyond that for every fourth


def capacities(dense_batch_size: int) -> tuple[int, ...]:
    """Sizes to capture graphs for, the dense batch size last.

    A graph serves any smaller batch with work proportional to its tokens, but its GEMMs' tiles were chosen for the
    size it was captured for: those that just fill the GPU at 768 rows leave a seventh of it idle at 640. The more
    blocks there are the less one matters, so sizes lie farther apart; below a block they are powers of two.
    """
    sizes = {SMALLEST, SMALLEST * 2, SMALLEST * 4}
    sizes |= {*range(BLOCK, FINE, BLOCK), *range(FINE, dense_batch_size, BLOCK * COARSE_BLOCKS)}
    return (*sorted(size for size in sizes if size < dense_batch_size), dense_batch_size)


def step_plans(plan: PipelinePlan, operations: Sequence[Operation]) -> tuple[PipelinePlan, ...]:
    """The plans to capture graphs of, smallest first: ``plan`` itself for the largest batches, the sequential one for
    smaller ones, whose nano-batches would be too small to be worth it.

    Args:
        operations: of one layer of the model.
    """
    *smaller, _ = capacities(plan.dense_batch_size)
    return (*(sequential_plan(operations, size) for size in smaller), plan)


class GraphPool:
    """Graphs by the number of tokens they serve at most; who made them frees them."""

    def __init__(self, graphs: Mapping[int, Graph]) -> None:
        self._capacities = sorted(graphs)
        self._graphs = dict(graphs)

    def for_tokens(self, tokens: int) -> Graph:
        """The smallest graph that serves a batch of ``tokens``, which must be at most the dense batch size."""
        return self._graphs[self._capacities[bisect_left(self._capacities, tokens)]]
