"""Prefill attention: chunks of new tokens against everything cached of their sequences, causal, paged, grouped heads.

For row r of the dense batch, at position p of its sequence, and query head h of KV head h // group:
out[r, h] = Σ softmax(q[r, h] · K[0 … p] · scale) V[0 … p], or over the last ``window`` positions up to p. K and V of
the new tokens are in the cache already.

Arrays (bf16, fp32 accumulation; int32 indices), all on the device:
  q         rows of ``q_stride`` elements that begin with num_heads · head_dim rotated queries (the qkv buffer)
  kv_cache  [pages, num_kv_heads, 2, head_dim/64, page_size, 64], the 16-byte chunk c of row r at chunk c ^ (r % 8)
  out       [rows, num_heads · head_dim]; only rows of prefill sequences inside the planned range are written
  qo_indptr, kv_lens, kv_indptr, kv_indices, num_decode, num_seqs: as in scheduler/batch.py

Algorithm: FlashAttention-3 (Shah et al., arXiv 2407.08608): producer warps fill rings of shared-memory stages with
bulk copies, and two consumer warpgroups of 64 query rows each take turns on the tensor cores, so that the softmax of
one runs under the products of the other, and under its own previous product. Differences: rows of a tile are (token,
query head) pairs of one KV head, so that short chunks fill tiles and K and V are read once per group; the cache's
layout lets plain bulk copies do for any page table; two CTAs share a tile of 256 rows and each copies half of the
keys to both, which halves reads of L2; the first scores of a tile are computed under the last output of the tile
before; the output is rescaled only when a weight would exceed 2^8 (as in FlashAttention-4). CTAs are persistent and
take work (tile, KV head) from a counter: longest sequence first, and in it groups of KV heads whose keys fit in L2,
longest tiles first.

A planning kernel lists the tiles once per step for all layers: a scan of every sequence's lengths in each CTA of each
layer would cost more than a look at a list, and a list can be sorted.

Keys are not split between CTAs: a step whose few new tokens make fewer tiles × KV heads than half the SMs leaves SMs
idle, however long the context.
"""

from __future__ import annotations

import math

from nf.errors import InputError
from nf.kernels.kv_cache import HEAD_DIMS, check_shape
from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource

CLUSTER = 2  # CTAs that share a tile and the copies of its keys
CTA_ROWS = 128  # (token, query head of the group) pairs
THREADS = 384
PLAN_THREADS = 256
PLAN_CTAS = 32
PLAN_HEADER_BYTES = TILE_BYTES = 32
FILES = (
    "prefill_attention.cu", "prefill_consumer.cuh", "prefill_producer.cuh", "prefill_shared.cuh", "prefill_plan.cuh",
    "wgmma.cuh", "cluster.cuh", "memory.cuh", "hopper.cuh",
)  # fmt: skip
SHARED_BYTES = {64: 164_864, 128: 230_400}  # per CTA, by head_dim; checked where the kernel is compiled


def sources() -> list[KernelSource]:
    """The planning kernel, and attention for each head_dim."""
    plan = KernelSource(
        name="prefill_plan",
        language="cuda",
        files=("prefill_plan.cu", "prefill_plan.cuh", "hopper.cuh"),
        parameters=("pointer",) * 6 + ("int32",) * 3,
        entry="prefill_plan",
    )
    return [plan, *(_attention_source(head_dim) for head_dim in HEAD_DIMS)]


def _attention_source(head_dim: int) -> KernelSource:
    return KernelSource(
        name=f"prefill_attention_{head_dim}",
        language="cuda",
        files=FILES,
        parameters=("pointer",) * 5 + ("int32",) * 6 + ("float32",),
        entry="prefill_attention",
        config=(("HEAD_DIM", head_dim), ("CLUSTER", CLUSTER), ("SHARED_BYTES", SHARED_BYTES[head_dim])),
    )


class PrefillAttention:
    """Launches planning and attention for one shape of heads and pages.

    Args:
        loader: of ``sources()``, among others perhaps.
        num_heads, num_kv_heads: of this GPU.
        head_dim: 64 or 128.
        page_size: 16, 32 or 64 tokens.
        window: a token sees itself and the window − 1 positions before it; None: all.
        scale: of the scores, before the softmax; None is head_dim^-0.5.

    Raises:
        InputError: a shape that there is no kernel for.
    """

    def __init__(
        self,
        loader: KernelLoader,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        window: int | None = None,
        scale: float | None = None,
    ) -> None:
        check_shape(num_heads, num_kv_heads, head_dim, page_size)
        group = num_heads // num_kv_heads
        if window is not None and window < 1:
            raise InputError("window", f"must be at least 1, not {window}")
        if scale is not None and not scale > 0:
            raise InputError("scale", f"must be above 0, not {scale}")
        self._plan = loader.cuda("prefill_plan")
        self._attend = loader.cuda(f"prefill_attention_{head_dim}", shared_bytes=SHARED_BYTES[head_dim])
        self.tile_tokens = CLUSTER * (CTA_ROWS // group)
        inverse_group = -(-65536 // group)
        self._shape = (num_kv_heads, page_size.bit_length() - 1, group, inverse_group, window or 0)
        self._scale_log2 = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)

    def plan_bytes(self, max_tokens: int, max_seqs: int) -> int:
        """Bytes (16-byte aligned) of a plan for a range of at most ``max_tokens`` rows of ``max_seqs`` sequences."""
        tiles = max_tokens // self.tile_tokens + min(max_tokens, max_seqs)
        return PLAN_HEADER_BYTES + tiles * TILE_BYTES

    def plan(
        self,
        qo_indptr: int,
        kv_lens: int,
        kv_indptr: int,
        num_decode: int,
        num_seqs: int,
        plan: int,
        *,
        start: int,
        stop: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """Write to ``plan`` what there is to do for rows [start, stop) of the dense batch; once per step.

        All but ``start`` and ``stop`` are device pointers. ``num_decode`` and ``num_seqs`` point to one int32 each.
        """
        self._plan.launch(
            *(qo_indptr, kv_lens, kv_indptr, num_decode, num_seqs, plan, start, stop, self.tile_tokens),
            grid=PLAN_CTAS,
            block=PLAN_THREADS,
            stream=stream,
            pdl=pdl,
        )

    def launch(
        self,
        q: int,
        kv_cache: int,
        out: int,
        plan: int,
        kv_indices: int,
        *,
        q_stride: int,
        sms: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """Attend for the rows of a plan. Launches that share a plan must not overlap.

        Args:
            q, kv_cache, out: device pointers, 16-byte aligned, to row 0 and page 0 of one layer.
            plan: what ``plan`` wrote.
            kv_indices: device pointer.
            q_stride: elements between rows of q, a multiple of 8.
            sms: SMs to take, at least 2; an odd one is left.
            pdl: may start before the previous kernel of the stream has ended.
        """
        self._attend.launch(
            *(q, kv_cache, out, plan, kv_indices, q_stride, *self._shape, self._scale_log2),
            grid=sms - sms % CLUSTER,
            block=THREADS,
            stream=stream,
            pdl=pdl,
        )
