"""Decode attention over the paged KV cache: one query token per sequence, GQA, split over KV with balanced work.

Shapes (H query heads, G KV heads, d head_dim, T tokens of the dense batch; bf16 unless said otherwise):

- q [T, q_stride elements]: rows of the qkv buffer after rotation, its first H·d columns; row i is sequence i
- kv, of one layer: [num_pages, G, 2 (K, V), d/64, page_size, 64], 16-byte chunk c of row r at chunk c ^ (r % 8)
- kv_lens [S], kv_indptr [S + 1], kv_indices [pages]: int32, as in nf.scheduler.batch; a decode row has kv_lens ≥ 1
- out [T, H·d]

``plan``, once per step and range of rows and shared by all layers, cuts the KV of the rows into spans of equal price;
``launch`` attends each span (decode_attention.cu) and merges what spans share (decode_merge.cu). All read from device
memory what varies from step to step, so a captured graph serves every batch.

Spans follow from all rows together, as in stream-K (Osama et al., arXiv 2301.03598): a row's neighbours decide
where its KV is cut, and with that its rounding, never more. Cuts at fixed positions would make results independent of
neighbours to the bit, but leave SMs idle wherever lengths are not multiples of them, and the GEMMs around choose their
tiles by batch size anyway. For a given batch, results are the same in every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nf.kernels.kv_cache import HEAD_DIMS, PAGE_SIZES, PagedShape
from nf.kernels.load import CudaKernel, KernelLoader
from nf.kernels.source import KernelSource, ParameterKind

NOTE_BYTES = 24  # beside each stage: a note and a barrier
FEW_SMS = 64
MIN_SPAN_BYTES = 65536  # of KV: shorter spans cost more than they save
ENTRY_BYTES = 32768  # that a warp could read while it goes to its next group; below the former, or spans could be empty

MERGE_WARPS, MERGE_CTAS = 8, 4  # warps per CTA, CTAs per SM

_HEADER_BYTES, _SPAN_BYTES, _MERGE_BYTES = 32, 32, 32  # of the plan; the last two per span
_PLAN_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 4, *("int32",) * 10)
_MERGE_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 4, *("int32",) * 4)
_ATTENTION_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 9, *("int32",) * 7, "float32")


@dataclass(frozen=True, slots=True)
class Ring:
    """What a CTA, of which there is one per SM, has of KV on its way.

    Args:
        warps: each with a ring of its own.
        stages: of a ring.
        stage_bytes: of KV, one tile. A stage is refilled once its tile is in registers, so small ones leave more of the
            ring on its way, but every tile costs a warp some time besides.
    """

    warps: int
    stages: int
    stage_bytes: int

    def tile_keys(self, head_dim: int) -> int:
        """Keys of a tile: K and V of each are 4 · head_dim bytes."""
        return self.stage_bytes // (4 * head_dim)

    @property
    def shared_bytes(self) -> int:
        return self.warps * self.stages * (self.stage_bytes + NOTE_BYTES)


# On few SMs each needs as many bytes on their way as possible, in as many rings as registers suffice for, as a warp
# leaves its own alone while it goes from one group to the next; and its four schedulers an equal number of warps. On
# many SMs, more bytes than saturate HBM only make everything wait longer.
ON_FEW_SMS, ON_MANY_SMS = Ring(warps=12, stages=2, stage_bytes=8192), Ring(warps=4, stages=2, stage_bytes=16384)


def ring_on(sms: int) -> Ring:
    """Of a launch on ``sms`` multiprocessors."""
    return ON_FEW_SMS if sms <= FEW_SMS else ON_MANY_SMS


def sources() -> list[KernelSource]:
    """The planning and the merging kernel, and attention kernels for each head_dim and page_size."""
    attention = {
        attention_source(head_dim, page_size, ring): None
        for head_dim in HEAD_DIMS
        for page_size in PAGE_SIZES
        for ring in (ON_FEW_SMS, ON_MANY_SMS)
    }
    return [plan_source(), merge_source(), *attention]


def plan_source() -> KernelSource:
    return KernelSource(
        name="decode_plan",
        language="cuda",
        files=("decode_plan.cu", "decode_plan.cuh"),
        parameters=_PLAN_PARAMETERS,
        entry="decode_plan",
        config=(("THREADS", 1024),),
    )


def merge_source() -> KernelSource:
    return KernelSource(
        name="decode_merge",
        language="cuda",
        files=("decode_merge.cu", "decode_plan.cuh", "hopper.cuh"),
        parameters=_MERGE_PARAMETERS,
        entry="decode_merge",
        config=(("WARPS", MERGE_WARPS),),
    )


def attention_source(head_dim: int, page_size: int, ring: Ring) -> KernelSource:
    tile = ring.tile_keys(head_dim)
    return KernelSource(
        name=f"decode_attention_d{head_dim}_p{page_size}_t{tile}_w{ring.warps}",
        language="cuda",
        files=(
            *("decode_attention.cu", "decode_sums.cuh", "decode_walk.cuh", "decode_shared.cuh", "decode_plan.cuh"),
            *("memory.cuh", "hopper.cuh"),
        ),
        parameters=_ATTENTION_PARAMETERS,
        entry="decode_attention",
        config=(("HEAD_DIM", head_dim), ("PAGE_SIZE", page_size), ("TILE", tile), ("WARPS", ring.warps)),
    )


@dataclass(frozen=True, slots=True)
class DecodeShape(PagedShape):
    """What decode attention is launched for."""

    window: int | None = None  # a token sees itself and the window − 1 positions before

    def max_spans(self, sms: int) -> int:
        """One per warp of the widest launch on up to ``sms`` multiprocessors."""
        return max(sms * ring_on(sms).warps, min(sms, FEW_SMS) * ON_FEW_SMS.warps)

    def workspace_bytes(self, sms: int) -> int:
        """Device memory (256-byte aligned, any content) of one range of rows: its plan and partial results.

        Args:
            sms: multiprocessors of the GPU; launches on fewer need no more.
        """
        out = _partials(self.max_spans(sms))[1]
        return out + 2 * self.max_spans(sms) * self.head_dim * 8 * 4


class DecodeAttention:
    """Launches decode attention of one shape. Ranges whose launches may overlap need a workspace each.

    Args:
        loader: of ``sources()``, at least of the three kernels that ``shape`` needs.
        sms: multiprocessors of the GPU.
    """

    def __init__(self, loader: KernelLoader, shape: DecodeShape, *, sms: int) -> None:
        self.shape = shape
        self.max_spans = shape.max_spans(sms)
        self._plan = loader.cuda(plan_source().name)
        self._attention = {ring: self._load(loader, ring) for ring in (ON_FEW_SMS, ON_MANY_SMS)}
        self._merge = loader.cuda(merge_source().name)
        self._stats, self._out = _partials(self.max_spans)
        self._scale_log2 = shape.head_dim**-0.5 * math.log2(math.e)

    def _load(self, loader: KernelLoader, ring: Ring) -> CudaKernel:
        shape = self.shape
        source = attention_source(shape.head_dim, shape.page_size, ring)
        return loader.cuda(source.name, shared_bytes=ring.shared_bytes)

    def plan(
        self,
        *,
        kv_lens: int,
        kv_indptr: int,
        num_decode: int,
        workspace: int,
        start: int,
        stop: int,
        sms: int,
        stream: int,
    ) -> None:
        """Plan the decode rows among rows [start, stop), for attention on ``sms`` multiprocessors.

        Args:
            kv_lens, kv_indptr, num_decode: device pointers; num_decode is the number of decode rows of the step.
            workspace: device pointer, see ``DecodeShape.workspace_bytes``.
        """
        shape, ring = self.shape, ring_on(sms)
        self._plan.launch(
            kv_lens, kv_indptr, num_decode, workspace, start, stop, shape.num_kv_heads, ring.tile_keys(shape.head_dim),
            shape.head_dim // 16, shape.window or 0, min(ring.warps * sms, self.max_spans),
            MIN_SPAN_BYTES // ring.stage_bytes, ENTRY_BYTES // ring.stage_bytes, self.max_spans,
            grid=1, block=1024, stream=stream,
        )  # fmt: skip

    def launch(
        self,
        *,
        q: int,
        q_stride: int,
        kv: int,
        out: int,
        kv_lens: int,
        kv_indptr: int,
        kv_indices: int,
        workspace: int,
        sms: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """Attend the rows that ``workspace`` was planned for; every other row of ``out`` is left alone.

        Args:
            q, kv, out: device pointers to row 0 and, of the layer, page 0.
            q_stride: elements from a row of q to the next.
            sms: CTAs to launch, one per multiprocessor: as many as the plan was made for, or on the same side of
                ``FEW_SMS``.
            pdl: start before the kernel before has ended, and wait for it on the device.
        """
        shape = self.shape
        part_out, part_stats = workspace + self._out, workspace + self._stats
        out_stride = shape.num_heads * shape.head_dim
        ring = ring_on(sms)
        self._attention[ring].launch(
            q, kv, out, kv_lens, kv_indptr, kv_indices, workspace, part_out, part_stats,
            shape.num_kv_heads, shape.group, q_stride, out_stride, shape.window or 0, self.max_spans, ring.stages,
            self._scale_log2,
            grid=sms, block=32 * ring.warps, stream=stream, pdl=pdl,
        )  # fmt: skip
        self._merge.launch(
            workspace, part_out, part_stats, out, shape.head_dim, shape.group, out_stride, self.max_spans,
            grid=MERGE_CTAS * sms, block=32 * MERGE_WARPS, stream=stream, pdl=True,
        )  # fmt: skip


def _partials(max_spans: int) -> tuple[int, int]:
    """Byte offsets in the workspace, behind the plan: statistics and outputs of two parts per span."""
    stats = -(-(_HEADER_BYTES + max_spans * (_SPAN_BYTES + _MERGE_BYTES)) // 256) * 256
    return stats, stats + 2 * max_spans * 64
