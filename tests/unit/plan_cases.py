"""Operations and plans for the tests of the pipeline plan, and a slow, plain reference of what must not be reordered.

The reference knows nothing of ranges: it lists every single element (buffer, row, kind of row) an operation touches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import strategies as st

from nf.config import ModelConfig
from nf.graphs.plan import LayerStep, NanoOperation, PipelinePlan, Stream
from nf.models.operations import PER_LAYER_BUFFERS, Operation, Resource, Rows
from nf.models.registry import declare

BUFFERS = ("hidden", "normed", "q", "kv")

LLAMA = declare(ModelConfig("LlamaForCausalLM", 64, 32, 64, 2, 4, 2, 8, 1e-5, 64)).operations
MIXTRAL = declare(ModelConfig("MixtralForCausalLM", 64, 32, 64, 2, 4, 2, 8, 1e-5, 64, num_experts=4)).operations

Element = tuple[str, int, int, Rows]
"""(buffer, layer or -1 where all layers share it, row, kind of row)"""


def touched(operation: Operation, start: int, stop: int, layer: int) -> tuple[set[Element], set[Element]]:
    """Elements read and elements written."""
    kinds = [Rows.DECODE, Rows.PREFILL] if operation.rows is Rows.ALL else [operation.rows]

    def elements(buffers: Sequence[str], first: int) -> set[Element]:
        return {
            (buffer, layer if buffer in PER_LAYER_BUFFERS else -1, row, kind)
            for buffer in buffers
            for row in range(first, stop)
            for kind in kinds
        }

    return elements(operation.reads, start) | elements(operation.reads_before, 0), elements(operation.writes, start)


def must_precede(steps: Sequence[LayerStep], operations: Sequence[Operation]) -> set[tuple[int, int]]:
    """All pairs (a, b) of indices into ``steps`` where a must run before b; every step is compared with every other."""
    order = {operation.name: index for index, operation in enumerate(operations)}
    logical = sorted(range(len(steps)), key=lambda i: (steps[i].layer, order[steps[i].operation.name], steps[i].start))
    reads, writes = zip(*(touched(s.operation, s.start, s.stop, s.layer) for s in steps), strict=True)
    return {
        (a, b)
        for position, a in enumerate(logical)
        for b in logical[position + 1 :]
        if writes[a] & (reads[b] | writes[b]) or reads[a] & writes[b]
    }


def closure(count: int, pairs: set[tuple[int, int]]) -> list[int]:
    """For each of ``count`` steps in a serial order, the mask of all steps that the pairs put before it."""
    before = [0] * count
    for a, b in sorted(pairs, key=lambda pair: pair[1]):
        assert a < b
        before[b] |= before[a] | 1 << a
    return before


def chain(steps: Sequence[LayerStep]) -> set[tuple[int, int]]:
    """The pairs of neighbours on each stream."""
    streams = {step.stream for step in steps}
    return {pair for s in streams for pair in pairwise([i for i, step in enumerate(steps) if step.stream == s])}


@st.composite
def operation_lists(draw: st.DrawFn) -> tuple[Operation, ...]:
    """A layer of one to five operations with any reads and writes."""
    buffers = st.lists(st.sampled_from(BUFFERS), max_size=2, unique=True).map(tuple)
    return tuple(
        Operation(
            name=f"op{index}",
            resource=draw(st.sampled_from(Resource)),
            reads=draw(buffers),
            writes=draw(buffers),
            reads_before=draw(st.sampled_from([(), (), ("kv",), ("q",)])),
            rows=draw(st.sampled_from(Rows)),
        )
        for index in range(draw(st.integers(1, 5)))
    )


@st.composite
def partitions(draw: st.DrawFn, tokens: int) -> list[tuple[int, int]]:
    """[0, tokens) cut into one to three ranges."""
    cuts = draw(st.sets(st.integers(1, tokens - 1), max_size=2)) if tokens > 1 else set()
    return list(pairwise([0, *sorted(cuts), tokens]))


@st.composite
def plans(draw: st.DrawFn, operations: Sequence[Operation], *, ordered: bool = True, max_lag: int = 2) -> PipelinePlan:
    """A plan for ``operations``: every operation cut in its own way, on up to three streams, with lags.

    ``ordered`` makes it free of deadlocks: lags are raised until no nano-operation has an earlier round than what it
    waits for, one order that suits a round is drawn, and then dealt out to the streams.
    """
    tokens = draw(st.integers(1, 6))
    ranges: list[tuple[int, int]] = []
    items: list[LayerStep] = []
    for operation in operations:
        for start, stop in draw(partitions(tokens)):
            ranges += [] if (start, stop) in ranges else [(start, stop)]
            items.append(LayerStep(operation, 0, start, stop, 0, ()))
    lags = [draw(st.integers(0, max_lag)) for _ in items]
    order = draw(st.permutations(range(len(items))))
    if ordered:
        waits = _waits_over_two_layers(items, operations)
        lags = _raise_lags(lags, waits)
        order = _sort_round(order, lags, waits)
    count = draw(st.integers(1, 3))
    dealt: list[list[NanoOperation]] = [[] for _ in range(count)]
    for index in order:
        item = items[index]
        nano_operation = NanoOperation(item.operation.name, ranges.index((item.start, item.stop)), lags[index])
        dealt[draw(st.integers(0, count - 1))].append(nano_operation)
    streams = tuple(Stream(f"stream {s}", tuple(each)) for s, each in enumerate(dealt) if each)
    return PipelinePlan("drawn", tokens, tuple(ranges), streams)


def _waits_over_two_layers(items: list[LayerStep], operations: Sequence[Operation]) -> set[tuple[int, int, int]]:
    """(a, b, gap): item b waits for item a of the same layer (gap 0) or of the layer before (gap 1)."""
    n = len(items)
    next_layer = [LayerStep(i.operation, 1, i.start, i.stop, 0, ()) for i in items]
    return {(a % n, b % n, b // n - a // n) for a, b in must_precede([*items, *next_layer], operations)}


def _raise_lags(lags: list[int], waits: set[tuple[int, int, int]]) -> list[int]:
    lags = list(lags)
    while True:
        late = [(a, b, gap) for a, b, gap in waits if lags[b] + gap < lags[a]]
        if not late:
            return lags
        for a, b, gap in late:
            lags[b] = max(lags[b], lags[a] - gap)


def _sort_round(order: Sequence[int], lags: list[int], waits: set[tuple[int, int, int]]) -> list[int]:
    """The first order of a round, by preference for ``order``, in which everything follows what it waits for."""
    left, result = list(order), []
    while left:
        same_round = {(a, b) for a, b, gap in waits if lags[a] == lags[b] + gap and a in left}
        item = next(i for i in left if not any(b == i for _, b in same_round))
        left.remove(item)
        result.append(item)
    return result
