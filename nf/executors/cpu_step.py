"""What the CPU operations need to know of a batch, worked out once per step and shared by all layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nf.executors.cpu_attention import TileShape, Work, decode_work, prefill_work
from nf.scheduler.batch import Batch, Int32

Float32 = NDArray[np.float32]


class Step:
    """One batch with page tables as a matrix and a (page, offset) for every token.

    Args:
        batch: to be run.
        shape: how attention is tiled.
        rotary: cosines and sines, [positions, head_dim / 2] each.
    """

    def __init__(self, batch: Batch, shape: TileShape, rotary: tuple[Float32, Float32]) -> None:
        self.num_tokens = batch.num_tokens
        self.num_decode = batch.num_decode
        self.positions = batch.positions
        self.cos, self.sin = (table[batch.positions] for table in rotary)
        self.page_tables = _page_tables(batch, shape.chunk_pages)
        self.kv_lens = batch.kv_lens
        self.sequence_of = np.repeat(np.arange(batch.num_seqs, dtype=np.int32), np.diff(batch.qo_indptr))
        self.first_row_of = batch.qo_indptr[self.sequence_of]
        self.pages = self.page_tables[self.sequence_of, batch.positions // shape.page_size]
        self.offsets = batch.positions % shape.page_size
        self._qo_indptr = batch.qo_indptr
        self._shape = shape
        self._work: dict[tuple[int, int], tuple[Work, ...]] = {}

    def attention(self, start: int, stop: int) -> tuple[Work, ...]:
        """Work of rows [start, stop), which are all decode or all prefill."""
        key = (start, stop)
        if key not in self._work:
            make = self._decode if stop <= self.num_decode else self._prefill
            self._work[key] = make(start, stop)
        return self._work[key]

    def _decode(self, start: int, stop: int) -> tuple[Work, ...]:
        rows = slice(start, stop)  # decoding sequences come first, one row each
        return decode_work(self._shape, self.page_tables[rows], self.kv_lens[rows], start)

    def _prefill(self, start: int, stop: int) -> tuple[Work, ...]:
        work: list[Work] = []
        for sequence in range(int(self.sequence_of[start]), int(self.sequence_of[stop - 1]) + 1):
            first = max(start, int(self._qo_indptr[sequence]))
            last = min(stop, int(self._qo_indptr[sequence + 1]))
            table, positions = self.page_tables[sequence], self.positions[first:last]
            work += prefill_work(self._shape, table, positions, first)
        return tuple(work)


def _page_tables(batch: Batch, multiple: int) -> Int32:
    """[seqs, pages], filled up with page 0 to a multiple of ``multiple`` pages."""
    counts = np.diff(batch.kv_indptr)
    longest = int(counts.max(initial=1))
    tables = np.zeros((batch.num_seqs, -(-longest // multiple) * multiple), np.int32)
    tables[np.arange(tables.shape[1]) < counts[:, None]] = batch.kv_indices
    return tables
