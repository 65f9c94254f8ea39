"""Device side of the dense GEMM: y = epilogue(x·Wᵀ) on Hopper, written in the CuTe DSL.

One producer warp streams tiles of both operands through a ring of shared-memory stages with TMA (multicast across the
cluster); one or two consumer warpgroups multiply them with WGMMA. CTAs are persistent: every cluster walks the tiles in
steps of the number of clusters. The scheme is that of CUTLASS 3's warp-specialised cooperative kernels for sm_90; each
warpgroup finishes and stores its own rows alone, so one may multiply while the other stores.

Two things are there for few rows. The CTAs of a cluster can split K: each adds up its share, and they exchange partial
sums through distributed shared memory so that every CTA finishes an equal part of the tile. And the operands can be
swapped (W·xᵀ), so that the 64 rows of a WGMMA are rows of W and its narrow side is the tokens. A tile may then have
fewer rows of W than its WGMMAs, so that tiles are as many as there are places for CTAs: what these read beyond it, the
next stage or what lies behind the ring, becomes sums that nobody stores.

The ring carries, for each tile of a CTA and in this order: its share of the K tiles, both operands to a stage; if K is
split, stages that the peers write their partial sums to; unless swapped, the residual or bias of the units that this
CTA finishes. All warps walk the same sequence, so the number of tiles done tells in which stage something stands, in a
peer's ring too (GemmConsumer._send). Of a consumer's two places in the ring, ``read`` is the stage it waits for next,
and ``release`` the oldest that a product may still be reading.

The number of rows is read from device memory, so one captured launch serves every smaller batch. Rows between that
number and the end of the last cluster's tiles come out as garbage unless the operands are swapped; rows from
``capacity`` on are never touched. The row count and W are read before the kernel before has ended (programmatic
dependent launch), all else after it; with experts everything is, since a kernel before counts the rows.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64, const_expr, cute, pipeline
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.memory import SmemAllocator

from nf.kernels.gemm_consumer_cute import ROW_MAJOR, GemmConsumer
from nf.kernels.gemm_producer_cute import GemmProducer
from nf.kernels.gemm_units_cute import TILE_K, GemmTile

PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = 232  # per thread


class Gemm(GemmProducer, GemmConsumer):
    """The kernel for one tile shape, epilogue and output type."""

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,  # [capacity, k] bf16
        w: cute.Pointer,  # [n, k] bf16, or [experts, n, k]
        y: cute.Pointer,  # [capacity, n], or n/2 columns for SwiGLU
        extra: cute.Pointer,  # [capacity, n] bf16 with a row stride of extra_stride
        rows: cute.Pointer,  # [1] int32
        experts: cute.Pointer,  # expert of each tile of x's rows, int32
        capacity: Int32,
        n: Int32,
        k: Int32,
        num_experts: Int32,
        extra_stride: Int32,  # n for a residual, 0 for a bias
        group: Int32,  # right tiles walked together before the left ones advance, for reuse in L2
        clusters: Int32,
        stream: cuda.CUstream,
    ):
        tile_m, tile_n, tile_k = self.tile
        k = cute.assume(k, 8)
        n = cute.assume(n, 16)
        extra_stride = cute.assume(extra_stride, 8)
        columns = cute.assume(n // 2, 8) if const_expr(self.epilogue == "swiglu") else n
        X = cute.make_tensor(x, cute.make_layout((capacity, k), stride=(k, 1)))
        W = cute.make_tensor(w, cute.make_layout((n, k), stride=(k, 1)))
        if const_expr(self.grouped):
            expert_stride = cute.assume(Int64(n) * Int64(k), 8)
            W = cute.make_tensor(w, cute.make_layout((n, k, num_experts), stride=(k, 1, expert_stride)))
        Y = cute.make_tensor(y, cute.make_layout((capacity, columns), stride=(columns, 1)))
        E = cute.make_tensor(extra, cute.make_layout((capacity, n), stride=(extra_stride, 1)))
        has_rows = Int32(extra_stride > 0)  # a residual; a bias is one row for all

        mma = self._mma(self.consumers)
        left_layout = hopper.make_smem_layout_a(ROW_MAJOR, self.tile, BFloat16, self.stages)
        right_layout = hopper.make_smem_layout_b(ROW_MAJOR, self.tile, BFloat16, self.stages)
        left, right = (W, X) if const_expr(self.swap) else (X, W)
        left_load, left = self._load_atom(left, left_layout, (tile_m, tile_k), self.cluster[1])
        right_load, right = self._load_atom(right, right_layout, (tile_n, tile_k), self.cluster[0])
        y_layout, y_store, e_layout, e_load = None, None, None, None
        if const_expr(not self.swap):
            box = (64, self.store_columns)
            y_layout = hopper.make_smem_layout_epi(self.out, ROW_MAJOR, box, self.consumers * self.store_stages)
            y_store, Y = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileS2GOp(), Y, cute.slice_(y_layout, (None, None, 0)), box
            )
            if const_expr(self.epilogue == "add"):
                e_layout = hopper.make_smem_layout_epi(BFloat16, ROW_MAJOR, box, self.stages * self.units_per_block)
                # Of a bias only the first row of a box is there; TMA reads nothing for the others.
                e_rows = 1 + has_rows * (capacity - 1)
                E = cute.make_tensor(extra, cute.make_layout((e_rows, n), stride=(n, 1)))
                e_load, E = self._load_atom(E, e_layout, box, 1)

        y_size = 1 if const_expr(self.swap) else cute.cosize(y_layout)

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[Int64, self.stages * 2]
            exchange: cute.struct.MemRange[Int64, 2]
            left: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(left_layout)], 1024]
            right: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(right_layout)], 1024]
            y: cute.struct.Align[cute.struct.MemRange[self.out, y_size], 1024]

        self.shared = Shared
        rows = cute.make_tensor(rows, cute.make_layout(1))
        tile_experts = cute.make_tensor(experts, cute.make_layout(cute.ceil_div(capacity, tile_m)))
        self.kernel(
            left_load, left, right_load, right, y_store, Y, e_load, E, rows, tile_experts, mma,
            left_layout, right_layout, y_layout, e_layout, has_rows, capacity, n, k, group,
        ).launch(
            grid=(self.cluster[0], self.cluster[1], self.split * clusters),
            block=(self.threads, 1, 1),
            cluster=self.cluster,
            min_blocks_per_mp=self.residents,
            preferred_smem_carveout=100,
            stream=stream,
            use_pdl=True,
        )  # fmt: skip

    @staticmethod
    def _load_atom(tensor, layout, shape, multicast):
        op = cpasync.CopyBulkTensorTileG2SMulticastOp() if multicast > 1 else cpasync.CopyBulkTensorTileG2SOp()
        one_stage = cute.slice_(layout, (None, None, 0))
        return cpasync.make_tiled_tma_atom(op, tensor, one_stage, shape, num_multicast=multicast)

    @cute.kernel
    def kernel(
        self,
        left_load: cute.CopyAtom,
        left: cute.Tensor,
        right_load: cute.CopyAtom,
        right: cute.Tensor,
        y_store: cute.CopyAtom | None,
        Y: cute.Tensor,
        e_load: cute.CopyAtom | None,
        E: cute.Tensor,
        rows: cute.Tensor,
        tile_experts: cute.Tensor,
        mma: cute.TiledMma,
        left_layout: cute.ComposedLayout,
        right_layout: cute.ComposedLayout,
        y_layout: cute.ComposedLayout | None,
        e_layout: cute.ComposedLayout | None,
        has_rows: Int32,
        capacity: Int32,
        n: Int32,
        k: Int32,
        group: Int32,
    ):
        tile_m, tile_n, tile_k = self.tile
        thread, _, _ = cute.arch.thread_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group_index = cute.arch.make_warp_uniform(thread // 128)
        if warp_index == 0:
            cpasync.prefetch_descriptor(left_load)
            cpasync.prefetch_descriptor(right_load)
            if const_expr(not self.swap):
                cpasync.prefetch_descriptor(y_store)

        cluster = cute.make_layout(self.cluster)
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        place = cluster.get_flat_coord(rank)
        shared = SmemAllocator().allocate(self.shared)
        # Every consumer warp frees a stage in each CTA that multicasts into it.
        releases = (self.cluster[0] + self.cluster[1] - 1) * self.consumers * 4
        ring = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=self.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, releases),
            tx_count=(tile_m + tile_n) * tile_k * 2,
            cta_layout_vmnk=cute.make_layout((1, *self.cluster)),
            defer_sync=True,
        )
        # Phase t of "room": every peer has set aside stages for the parts of this CTA's tile t. Of "drained": this
        # CTA's warps have read theirs; only then is room made for the next tile, so that no peer misses a phase.
        room, drained = shared.exchange.data_ptr(), shared.exchange.data_ptr() + 1
        if const_expr(self.split > 1):
            if warp_index == 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_init(room, self.split - 1)
                    cute.arch.mbarrier_init(drained, self.consumers * 4)
        pipeline.pipeline_init_arrive(cluster_shape_mn=self.cluster, is_relaxed=True)
        s_left = shared.left.get_tensor(left_layout.outer, swizzle=left_layout.inner)
        s_right = shared.right.get_tensor(right_layout.outer, swizzle=right_layout.inner)
        s_multiplied = s_left  # with as many rows as are multiplied
        if const_expr(self.mma_rows > tile_m):
            rows_layout = hopper.make_smem_layout_a(ROW_MAJOR, (self.mma_rows, tile_n, tile_k), BFloat16, 1)
            stages_layout = cute.make_layout(self.stages, stride=tile_m * tile_k)
            s_multiplied = shared.left.get_tensor(
                cute.append(cute.slice_(rows_layout.outer, (None, None, 0)), stages_layout), swizzle=left_layout.inner
            )
        sY, sE, sE_read = None, None, None
        if const_expr(not self.swap):
            sY = shared.y.get_tensor(y_layout.outer, swizzle=y_layout.inner)
            if const_expr(self.epilogue == "add"):
                sE = shared.right.get_tensor(e_layout.outer, swizzle=e_layout.inner)
                columns, slots = self.store_columns, self.stages * self.units_per_block
                stride = cute.assume(has_rows * columns, 8)  # of a bias every row is the first, which no swizzle moves
                sE_read = shared.right.get_tensor(
                    cute.make_layout((64, columns, slots), stride=(stride, 1, 64 * columns)), swizzle=e_layout.inner
                )
        quads, wgs, parts = self.unit_values // 4, self.consumers, self.parts_per_stage
        part_size = 128 * self.unit_values
        longer = shared.left if const_expr(tile_m > tile_n) else shared.right
        received = longer.get_tensor(  # as threads hold them: 16 bytes side by side
            cute.make_layout(
                (4, 128, quads, wgs, parts, self.stages),
                stride=(1, 4, 512, part_size, part_size * wgs, max(tile_m, tile_n) * TILE_K // 2),
            ),
            dtype=Float32,
        )
        pipeline.pipeline_init_wait(cluster_shape_mn=self.cluster)

        if const_expr(self.grouped):
            cute.arch.griddepcontrol_wait()  # an earlier kernel sorts the rows by expert and counts them
        valid = cutlass.min(rows[0], capacity)
        m_tiles = cute.ceil_div(n if const_expr(self.swap) else valid, tile_m * self.cluster[0])
        n_tiles = cute.ceil_div(valid if const_expr(self.swap) else n, tile_n * self.cluster[1])
        if group_index == 0:
            if const_expr(self.residents == 1):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_index == 0:
                self._produce(
                    ring, left_load, left, right_load, right, s_left, s_right, e_load, E, sE, has_rows, room, drained,
                    tile_experts, cluster, place, m_tiles, n_tiles, k, group,
                )  # fmt: skip
        else:
            if const_expr(self.residents == 1):
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            self._consume(
                ring, mma, s_multiplied, s_right, sY, sE_read, received, room, drained, y_store, Y, E, thread - 128,
                place, m_tiles, n_tiles, k, group, valid, n,
            )  # fmt: skip


def build(
    tile_m: int, tile_n: int, cluster_m: int, cluster_n: int, split: int, warpgroups: int, swap: bool, residents: int,
    evict: str, epilogue: Any, out: str, grouped: bool,
) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
    """The jit function and example arguments of one configuration."""
    out_type = getattr(cutlass, out)
    tile = GemmTile(tile_m, tile_n, cluster_m, cluster_n, split, warpgroups, swap, residents, evict)
    gemm = Gemm(tile, epilogue, out_type, grouped=grouped)

    def pointer(dtype: Any, align: int = 16) -> Any:
        return make_ptr(dtype, 16, cute.AddressSpace.gmem, assumed_align=align)

    tensors = [pointer(BFloat16), pointer(BFloat16), pointer(out_type), pointer(BFloat16)]
    tensors += [pointer(Int32, 4), pointer(Int32, 4)]
    sizes = tuple(Int32(value) for value in (128, 256, 256, 1, 256, 8, 66))
    return gemm, (*tensors, *sizes, make_fake_stream())
