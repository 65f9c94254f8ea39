"""Rotary embedding and KV append in one pass over qkv, with optional per-head RMSNorm of q and k (Qwen3).

Rotation: Su et al., arXiv 2104.09864, the two halves of a head against each other. Shapes (T tokens, Hq query heads,
Hkv KV heads, d head_dim; bf16 unless said otherwise):

- qkv [T, (Hq + 2·Hkv)·d]: query heads, then keys, then values
- q [T, q_stride]: rotated queries. By default they replace those in qkv: that spares a buffer, and the lines are still
  in L2. Attention takes a row stride, so it reads them where they are
- kv, of one layer: [num_pages, Hkv, 2 (K, V), d/64, page_size, 64], 16-byte chunk c of row r at chunk c ^ (r % 8)
- table fp32 [positions, d/2, 2]: cosine and sine, see ``rotary_pairs``
- rows int32 [T]: page · page_size + offset of each token, which ``KvRows`` works out once per step for all layers
- positions int32 [T]; q_norm, k_norm [d]; count [1]: int32, how many tokens there are

Values that are not finite are stored as 0 and their keys as NaN: a mask hides a key, but attention multiplies masked
values by zero, and 0 · NaN would leak into the next owner of the page. The CPU executor does the same.

``positions`` and ``count`` are inputs of the step: they are read before the kernel before has ended, and must not be
its output. Memory-bound: every byte of qkv is read once and written once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.kernels.kv_cache import HEAD_DIMS, PAGE_SIZES, PagedShape
from nf.kernels.load import KernelLoader
from nf.kernels.rows import grid_on
from nf.kernels.source import KernelSource, ParameterKind

_ROWS_THREADS, _ROPE_THREADS = 128, 256  # THREADS of the two kernels
_CTAS_PER_SM = 2  # of the second: as many as registers allow
_ROPE_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 9, *("int32",) * 5, "float32")


def sources() -> list[KernelSource]:
    """For each page size: the rows, and the pass over qkv for each head_dim, with norms or without."""
    passes = [
        rope_source(head_dim, page_size, qk_norm)
        for head_dim in HEAD_DIMS
        for page_size in PAGE_SIZES
        for qk_norm in (False, True)
    ]
    return [*(rows_source(page_size) for page_size in PAGE_SIZES), *passes]


def rope_source(head_dim: int, page_size: int, qk_norm: bool) -> KernelSource:
    return KernelSource(
        name=f"rope_append_d{head_dim}_p{page_size}" + ("_norm" if qk_norm else ""),
        language="cuda",
        files=("rope_append.cu", "memory.cuh", "hopper.cuh"),
        parameters=_ROPE_PARAMETERS,
        entry="rope_append",
        config=(("HEAD_DIM", head_dim), ("PAGE_SIZE", page_size), ("QK_NORM", qk_norm)),
    )


def rows_source(page_size: int) -> KernelSource:
    return KernelSource(
        name=f"kv_rows_p{page_size}",
        language="cuda",
        files=("kv_rows.cu", "hopper.cuh"),
        parameters=("pointer",) * 7,
        entry="kv_rows",
        config=(("PAGE_SIZE", page_size),),
    )


def rotary_pairs(cosines: NDArray[np.float32], sines: NDArray[np.float32]) -> NDArray[np.float32]:
    """The table: cosines and sines [positions, d/2] of the host's rotary table side by side, [positions, d/2, 2]."""
    return np.ascontiguousarray(np.stack([cosines, sines], axis=-1), np.float32)


class KvRows:
    """Launches the step's map from tokens to rows of the cache.

    Args:
        loader: of ``sources()``, at least of the page size's.
        page_size: tokens per page.
    """

    def __init__(self, loader: KernelLoader, page_size: int) -> None:
        self._kernel = loader.cuda(rows_source(page_size).name)

    def launch(
        self,
        *,
        rows: int,
        positions: int,
        qo_indptr: int,
        kv_indptr: int,
        kv_indices: int,
        num_tokens: int,
        num_seqs: int,
        max_tokens: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """Fill ``rows`` for the step's tokens.

        Args:
            rows: device pointer, int32 [max_tokens].
            positions, qo_indptr, kv_indptr, kv_indices: device pointers to the batch's arrays.
            num_tokens, num_seqs: device pointers to the counts.
            max_tokens: the dense batch size.
        """
        self._kernel.launch(
            rows, positions, qo_indptr, kv_indptr, kv_indices, num_tokens, num_seqs,
            grid=-(-max_tokens // _ROWS_THREADS), block=_ROWS_THREADS, stream=stream, pdl=pdl,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeShape(PagedShape):
    """What the pass over qkv is launched for."""

    qk_norm: bool = False
    eps: float = 0.0  # of the norms of q and k

    @property
    def qkv_size(self) -> int:
        """Columns of qkv."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class RopeAppend:
    """Launches the pass over qkv of one shape.

    Args:
        loader: of ``sources()``, at least of the shape's.
    """

    def __init__(self, loader: KernelLoader, shape: RopeShape) -> None:
        self.shape = shape
        source = rope_source(shape.head_dim, shape.page_size, shape.qk_norm)
        self._kernel = loader.cuda(source.name)
        self._sizes = (shape.group, shape.num_kv_heads)
        self._eps = shape.eps
        self._qkv_vectors = shape.qkv_size // 8
        self._threads_per_token = shape.num_kv_heads * shape.head_dim // 16

    def launch(
        self,
        *,
        qkv: int,
        kv: int,
        table: int,
        rows: int,
        positions: int,
        count: int,
        start: int,
        stop: int,
        sms: int,
        stream: int,
        q: int = 0,
        q_stride: int = 0,
        q_norm: int = 0,
        k_norm: int = 0,
        pdl: bool = False,
    ) -> None:
        """Rotate and append the tokens that there are in [start, stop).

        Args:
            qkv, kv, table, rows, positions, count, q_norm, k_norm: device pointers to the arrays' first elements.
            sms: multiprocessors to spread over.
            q: device pointer to row 0 of the rotated queries, and elements from a row to the next (a multiple of 8);
                0 is in place.
            pdl: start before the kernel before has ended, and wait for it on the device.
        """
        self._kernel.launch(
            qkv, q or qkv, kv, table, rows, positions, q_norm, k_norm, count, start, stop, *self._sizes,
            q_stride // 8 if q else self._qkv_vectors, self._eps,
            grid=_grid(stop - start, self._threads_per_token, sms), block=_ROPE_THREADS, stream=stream, pdl=pdl,
        )  # fmt: skip


@functools.cache
def _grid(tokens: int, threads_per_token: int, sms: int) -> int:
    return grid_on(sms, -(-tokens * threads_per_token // _ROPE_THREADS), _CTAS_PER_SM)
