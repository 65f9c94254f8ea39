"""Check while a step runs that every operation reads what the operation before it, in logical order, has written.

This does not use the plan's own derivation of dependencies: each buffer keeps, per row, a stamp of its last writer, and
a reader knows which stamp it must find. So a missing dependency shows, whether the row was not written yet or has
already been overwritten for a later layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.errors import ModelError, PlanError
from nf.graphs.plan import LayerStep
from nf.models.operations import PER_LAYER_BUFFERS, Operation, Rows

INPUT = "hidden"  # filled with embeddings before the first layer
UNWRITTEN, EMBEDDED = -1, 0  # other stamps: 1 + layer · operations + index of the operation


@dataclass(frozen=True, slots=True)
class _Read:
    """A buffer an operation reads, with the index of the writer it must find there."""

    buffer: str
    kind: Rows  # DECODE or PREFILL rows
    writer: int
    layers_back: int  # 1: written in the layer before
    rows_before: bool


class RowVersions:
    """Stamps of all buffers' rows.

    Args:
        operations: of one layer, in logical order.
        num_layers: of the model.
        dense_batch_size: rows.

    Raises:
        ModelError: an operation reads a buffer that none writes.
    """

    def __init__(self, operations: Sequence[Operation], num_layers: int, dense_batch_size: int) -> None:
        self._operations = operations
        self._index = {operation.name: i for i, operation in enumerate(operations)}
        buffers = sorted({buffer for operation in operations for buffer in operation.writes})
        self._stamps = {
            buffer: np.empty((num_layers if buffer in PER_LAYER_BUFFERS else 1, dense_batch_size), np.int32)
            for buffer in buffers
        }
        self._reads = [tuple(self._reads_of(i)) for i in range(len(operations))]
        self._num_layers = num_layers

    def begin(self, num_tokens: int, num_decode: int, first_rows: NDArray[np.int32]) -> None:
        """Start a step; ``first_rows`` is, per row, the first row of its sequence."""
        self._num_decode = num_decode
        self._num_tokens = num_tokens
        self._first_rows = first_rows
        for stamps in self._stamps.values():
            stamps[:, :num_tokens] = UNWRITTEN
        self._stamps[INPUT][:, :num_tokens] = EMBEDDED

    def run(self, step: LayerStep, start: int, stop: int) -> None:
        """Check what rows [start, stop) of an operation read, and note what they write.

        Raises:
            PlanError: a row does not hold what the operation must read.
        """
        index = self._index[step.operation.name]
        for read in self._reads[index]:
            first, last = self._rows_of_kind(read, start, stop)
            if first >= last:
                continue
            wanted = self._stamp(read, step.layer)
            found = self._rows(read.buffer, step.layer)[first:last]
            if (found != wanted).any():
                row = first + int(np.argmax(found != wanted))
                raise self._violation(step, read, row, int(found[row - first]))
        for buffer in step.operation.writes:
            self._rows(buffer, step.layer)[start:stop] = 1 + step.layer * len(self._operations) + index

    def finish(self) -> None:
        """Check that every row of the last layer's output was written, and by nothing but its last writer."""
        last = max(i for i, operation in enumerate(self._operations) if INPUT in operation.writes)
        wanted = 1 + (self._num_layers - 1) * len(self._operations) + last
        if (self._stamps[INPUT][0, : self._num_tokens] != wanted).any():
            raise PlanError("plan", f"{self._operations[last].name} of the last layer did not write every row")

    def _reads_of(self, index: int) -> list[_Read]:
        operation = self._operations[index]
        reads = []
        for kind in (Rows.DECODE, Rows.PREFILL):
            if not operation.rows.meets(kind):
                continue
            for buffer in dict.fromkeys((*operation.reads, *operation.reads_before)):
                writer, layers_back = self._last_writer(index, buffer, kind)
                reads.append(_Read(buffer, kind, writer, layers_back, buffer in operation.reads_before))
        return reads

    def _last_writer(self, index: int, buffer: str, kind: Rows) -> tuple[int, int]:
        """The writer that comes last before operation ``index``, going round through the layer before."""
        count = len(self._operations)
        for back in range(1, count + 1):
            writer = self._operations[(index - back) % count]
            if buffer in writer.writes and writer.rows.meets(kind):
                return (index - back) % count, int(back > index)
        raise ModelError("operations", f"{self._operations[index].name} reads {buffer}, which no operation writes")

    def _rows_of_kind(self, read: _Read, start: int, stop: int) -> tuple[int, int]:
        if read.kind is Rows.DECODE:
            return start, min(stop, self._num_decode)
        first = max(start, self._num_decode)
        if read.rows_before and first < stop:
            first = int(self._first_rows[first])
        return first, stop

    def _rows(self, buffer: str, layer: int) -> NDArray[np.int32]:
        rows: NDArray[np.int32] = self._stamps[buffer][layer if buffer in PER_LAYER_BUFFERS else 0]
        return rows

    def _stamp(self, read: _Read, layer: int) -> int:
        layer -= read.layers_back
        if layer < 0:
            return EMBEDDED
        return 1 + layer * len(self._operations) + read.writer

    def _violation(self, step: LayerStep, read: _Read, row: int, found: int) -> PlanError:
        layer = step.layer - read.layers_back
        wanted = f"{self._operations[read.writer].name} of layer {layer}" if layer >= 0 else "the embedding"
        return PlanError(
            "plan",
            f"{step.operation.name} of layer {step.layer} reads row {row} of {read.buffer}, which should hold "
            f"the result of {wanted} but holds {self._tell(found)}",
        )

    def _tell(self, stamp: int) -> str:
        if stamp == UNWRITTEN:
            return "nothing yet"
        if stamp == EMBEDDED:
            return "the embedding"
        layer, index = divmod(stamp - 1, len(self._operations))
        return f"that of {self._operations[index].name} of layer {layer}"
