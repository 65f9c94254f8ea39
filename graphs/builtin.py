"""Plans made from the operations of a model alone, without measurement: they run anywhere and are the starting point.

Both are written over resource classes and kinds of rows, so that a new model needs no plan of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from nf.errors import PlanError
from nf.graphs.pipeline_plan import NanoOperation, PipelinePlan, Stream
from nf.models.operations import Operation, Resource, Rows

TILE = 128  # tokens; a GEMM works on so many rows at a time, a smaller remainder costs as much
LAG = 1  # rounds


def sequential_plan(operations: Sequence[Operation], dense_batch_size: int) -> PipelinePlan:
    """One nano-batch on one stream, in the order of declaration: what engines without nano-batches do."""
    stream = Stream("compute", tuple(NanoOperation(operation.name, 0) for operation in operations))
    return PipelinePlan("sequential", dense_batch_size, ((0, dense_batch_size),), (stream,))


def nano_batch_plan(operations: Sequence[Operation], dense_batch_size: int) -> PipelinePlan:
    """Two nano-batches, the decode attention of each beside the GEMMs of the other.

    A layer falls into three parts: what comes before decode attention, decode attention, and the rest. Round r is, for
    the nano-batches 0 and 1::

        compute │ rest 0, layer r−1   before 0, layer r │ rest 1, layer r−1   before 1, layer r
        memory  │ decode attention 1, layer r−1         │ decode attention 0, layer r

    so each decode attention has a whole layer's GEMMs beside it, and the compute stream never waits if it is shorter
    than they are. It follows NanoFlow's pipeline for an 8B model on one GPU (arXiv 2408.12757), but keeps prefill
    attention, which is compute-bound, with the GEMMs.
    Collectives, where a model has them, get a third stream.

    Raises:
        PlanError: ``dense_batch_size`` is less than 2.
    """
    if dense_batch_size < 2:
        raise PlanError("dense_batch_size", f"must be at least 2 tokens to make 2 nano-batches, got {dense_batch_size}")
    names = [operation.name for operation in operations]
    lanes = [lane_of(operation) for operation in operations]
    first = lanes.index("memory") if "memory" in lanes else len(lanes)
    last = first + len(list(takewhile(lambda lane: lane == "memory", lanes[first:])))
    before, attention, rest = names[:first], names[first:last], names[last:]

    # Nano-batch 0 is ahead: its attention runs in the round of what it waits for, that of nano-batch 1 in the next.
    parts = [(attention, 1, LAG), (rest, 0, LAG), (before, 0, 0), (attention, 0, 0), (rest, 1, LAG), (before, 1, 0)]
    in_order = [NanoOperation(name, nano_batch, lag) for part, nano_batch, lag in parts for name in part]
    lane_by_name = dict(zip(names, lanes, strict=True))
    streams = tuple(
        Stream(lane, items, priority=priority)
        for lane, priority in _PRIORITY.items()
        if (items := tuple(item for item in in_order if lane_by_name[item.operation] == lane))
    )
    middle = _middle(dense_batch_size)
    return PipelinePlan("nano-batch", dense_batch_size, ((0, middle), (middle, dense_batch_size)), streams)


BUILT_IN = {"sequential": sequential_plan, "nano-batch": nano_batch_plan}

# The small kernels of the side streams must find room between the tiles of a GEMM, not wait for its end.
_PRIORITY = {"compute": 0, "memory": -1, "network": -1}


def lane_of(operation: Operation) -> str:
    """The stream an operation goes to.

    Memory-bound operations over all rows (norms, RoPE) are short and stand between two GEMMs of the same nano-batch:
    elsewhere they would cost two events each and queue behind decode attention. Only the reading of the KV cache is
    long enough to overlap.
    """
    if operation.resource is Resource.NETWORK:
        return "network"
    if operation.resource is Resource.MEMORY and operation.rows is Rows.DECODE:
        return "memory"
    return "compute"


def _middle(tokens: int) -> int:
    """Where two halves meet: at a whole tile if there is more than one."""
    half = tokens // 2
    return half if tokens <= TILE else max(TILE, (half + TILE // 2) // TILE * TILE)
