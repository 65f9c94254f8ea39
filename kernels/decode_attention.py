"""Decode attention over the paged KV cache: one query token per sequence, GQA, split over KV with balanced work.

Shapes (H query heads, G KV heads, d head_dim, T tokens of the dense batch; bf16 unless said otherwise):

- q [T, q_stride elements]: rows of the qkv buffer after rotation, its first H·d columns; row i is sequence i
- kv, of one layer: [num_pages, G, 2 (K, V), d/64, page_size, 64], 16-byte chunk c of row r at chunk c ^ (r % 8)
- kv_lens [S], kv_indptr [S + 1], kv_indices [pages]: int32, as in nf.scheduler.batch; a decode row has kv_lens ≥ 1
- out [T, H·d]

``plan``, once per step and range of rows and shared by all layers, cuts the KV of the rows into spans of equal length;
``__call__`` attends each span (decode_attention.cu) and merges what spans share (decode_merge.cu). All read from device
memory what varies from step to step, so a captured graph serves every batch.

The spans follow from all rows together, as in stream-K (Osama et al., arXiv 2301.03598): a row's neighbours decide
where its KV is cut, and with that its rounding, never more. Cuts at fixed positions would make results independent of
neighbours to the bit, but leave SMs idle wherever lengths are not multiples of them, and the GEMMs around choose their
tiles by batch size anyway. For a given batch, results are the same in every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nf.kernels.kv_cache import HEAD_DIMS, PAGE_SIZES, PagedShape
from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource, ParameterKind

STAGES = 2  # of a warp's ring
NOTE_BYTES = 24  # beside each stage: a note and a barrier
# Warps per CTA, one CTA per SM. On few SMs each must have as many bytes on their way as fit; on many, more than enough
# to saturate HBM only makes everything wait longer. One warp alone keeps up with about 26 GB/s.
FEW_SMS, FEW_SMS_WARPS, WARPS = 64, 7, 4
MIN_SPAN, MAX_SPAN = 128, 2048  # keys: shorter spans cost more than they save, longer ones are handed out in rounds

MERGE_WARPS, MERGE_CTAS = 8, 4  # warps per CTA, CTAs per SM

_HEADER_BYTES, _SPAN_BYTES, _MERGE_BYTES = 32, 32, 32  # of the plan; the last two per span
_PLAN_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 4, *("int32",) * 10)
_MERGE_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 4, *("int32",) * 4)
_ATTENTION_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 9, *("int32",) * 7, "float32")


def sources() -> list[KernelSource]:
    """The planning and the merging kernel, and an attention kernel for each head_dim and page_size."""
    attention = [attention_source(head_dim, page_size) for head_dim in HEAD_DIMS for page_size in PAGE_SIZES]
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


def attention_source(head_dim: int, page_size: int) -> KernelSource:
    return KernelSource(
        name=f"decode_attention_d{head_dim}_p{page_size}",
        language="cuda",
        files=("decode_attention.cu", "decode_plan.cuh", "hopper.cuh"),
        parameters=_ATTENTION_PARAMETERS,
        entry="decode_attention",
        config=(("HEAD_DIM", head_dim), ("PAGE_SIZE", page_size), ("TILE", tile_keys(head_dim))),
    )


def tile_keys(head_dim: int) -> int:
    """Keys per stage: 16 KB of KV."""
    return 4096 // head_dim


def warps_on(sms: int) -> int:
    """Warps per CTA of a launch on ``sms`` multiprocessors."""
    return FEW_SMS_WARPS if sms <= FEW_SMS else WARPS


@dataclass(frozen=True, slots=True)
class DecodeShape(PagedShape):
    """What decode attention is launched for."""

    window: int | None = None  # a token sees itself and the window − 1 positions before

    def max_spans(self, sms: int) -> int:
        """One per warp of the widest launch on up to ``sms`` multiprocessors; launches on few hand out several."""
        return max(sms * warps_on(sms), min(sms, FEW_SMS) * FEW_SMS_WARPS)

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
        self.sms = sms
        self.max_spans = shape.max_spans(sms)
        tile = tile_keys(shape.head_dim)
        self._plan = loader.cuda(plan_source().name)
        attention = attention_source(shape.head_dim, shape.page_size).name
        stage_bytes = tile * shape.head_dim * 4 + NOTE_BYTES
        self._attention = {
            warps: loader.cuda(attention, shared_bytes=warps * STAGES * stage_bytes) for warps in (WARPS, FEW_SMS_WARPS)
        }
        self._merge = loader.cuda(merge_source().name)
        self._stats, self._out = _partials(self.max_spans)
        self._scale_log2 = shape.head_dim**-0.5 * math.log2(math.e)

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
        shape, tile = self.shape, tile_keys(self.shape.head_dim)
        self._plan(
            kv_lens, kv_indptr, num_decode, workspace, start, stop, shape.num_kv_heads, tile, shape.head_dim // 16,
            shape.window or 0, warps_on(sms) * sms, MIN_SPAN // tile, MAX_SPAN // tile, self.max_spans,
            grid=1, block=1024, stream=stream,
        )  # fmt: skip

    def __call__(
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
            sms: CTAs to launch, one per multiprocessor; results are right whatever the plan was made for.
            pdl: start before the kernel before has ended, and wait for it on the device.
        """
        shape = self.shape
        part_out, part_stats = workspace + self._out, workspace + self._stats
        out_stride = shape.num_heads * shape.head_dim
        warps = warps_on(sms)
        self._attention[warps](
            q, kv, out, kv_lens, kv_indptr, kv_indices, workspace, part_out, part_stats,
            shape.num_kv_heads, shape.group, q_stride, out_stride, shape.window or 0, self.max_spans, STAGES,
            self._scale_log2,
            grid=sms, block=32 * warps, stream=stream, pdl=pdl,
        )  # fmt: skip
        self._merge(
            workspace, part_out, part_stats, out, shape.head_dim, shape.group, out_stride, self.max_spans,
            grid=MERGE_CTAS * sms, block=32 * MERGE_WARPS, stream=stream, pdl=True,
        )  # fmt: skip


def _partials(max_spans: int) -> tuple[int, int]:
    """Byte offsets in the workspace, behind the plan: statistics and outputs of two parts per span."""
    stats = -(-(_HEADER_BYTES + max_spans * (_SPAN_BYTES + _MERGE_BYTES)) // 256) * 256
    return stats, stats + 2 * max_spans * 64
