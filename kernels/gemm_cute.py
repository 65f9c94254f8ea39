"""Device side of the dense GEMM: y = epilogue(x·Wᵀ) on Hopper, written in the CuTe DSL.

One producer warp streams tiles of x and W through a ring of shared-memory stages with TMA (multicast across the
cluster); one or two consumer warpgroups multiply them with WGMMA and write their tile with TMA. CTAs are persistent:
every cluster walks the tiles in steps of the number of clusters. The scheme is that of CUTLASS 3's warp-specialised
cooperative kernels for sm_90.

The number of rows is read from device memory, so one captured launch serves every smaller batch. Rows between that
number and the end of the last tile come out as garbage; rows from ``capacity`` on are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

TILE_K = 64  # one 128-byte swizzle row of bf16
SHARED_BYTES = 227 * 1024
PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = {1: 240, 2: 232}  # per thread, by number of consumer warpgroups


@dataclass(frozen=True, slots=True)
class GemmTile:
    """Shape of the work of one CTA and one cluster; see GemmConfig in gemm.py for what is chosen when."""

    tile_m: int  # 64 or 128
    tile_n: int  # multiple of 32, at most 256
    cluster_m: int
    cluster_n: int
    group: int  # N tiles walked together before M advances again, for reuse in L2
    shared_bytes: int = SHARED_BYTES


class Gemm:
    """The kernel for one tile shape, epilogue and output type."""

    def __init__(self, tile: GemmTile, epilogue: Literal["none", "bias", "residual", "swiglu"], out: Any) -> None:
        self.tile = (tile.tile_m, tile.tile_n, TILE_K)
        self.cluster = (tile.cluster_m, tile.cluster_n)
        self.group = tile.group
        self.epilogue = epilogue
        self.out = out
        self.consumers = tile.tile_m // 64
        self.threads = 128 * (1 + self.consumers)
        self.out_n = tile.tile_n // 2 if epilogue == "swiglu" else tile.tile_n
        self.store_tile = (tile.tile_m, 32)
        self.store_stages = 4 if out.width == 16 else 2
        store_bytes = tile.tile_m * 32 * out.width // 8 * self.store_stages
        stage_bytes = (tile.tile_m + tile.tile_n) * TILE_K * 2
        self.stages = (tile.shared_bytes - 1024 - store_bytes) // stage_bytes

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,  # [capacity, k] bf16
        w: cute.Pointer,  # [n, k] bf16
        y: cute.Pointer,  # [capacity, n], or n/2 columns for SwiGLU
        extra: cute.Pointer,  # bias [n] or residual [capacity, n], bf16
        rows: cute.Pointer,  # [1] int32
        capacity: Int32,
        n: Int32,
        k: Int32,
        sms: Int32,
        stream: cuda.CUstream,
    ):
        tile_m, tile_n, tile_k = self.tile
        k = cute.assume(k, 8)
        n = cute.assume(n, 16)
        columns = cute.assume(n // 2, 8) if const_expr(self.epilogue == "swiglu") else n
        X = cute.make_tensor(x, cute.make_layout((capacity, k), stride=(k, 1)))
        W = cute.make_tensor(w, cute.make_layout((n, k), stride=(k, 1)))
        Y = cute.make_tensor(y, cute.make_layout((capacity, columns), stride=(columns, 1)))
        extra_stride = 0 if const_expr(self.epilogue == "bias") else n
        E = cute.make_tensor(extra, cute.make_layout((capacity, n), stride=(extra_stride, 1)))

        mma = hopper.make_trivial_tiled_mma(
            BFloat16, BFloat16, OperandMajorMode.K, OperandMajorMode.K, Float32, (self.consumers, 1, 1), (64, tile_n)
        )
        row_major = LayoutEnum.ROW_MAJOR
        x_layout = hopper.make_smem_layout_a(row_major, self.tile, BFloat16, self.stages)
        w_layout = hopper.make_smem_layout_b(row_major, self.tile, BFloat16, self.stages)
        y_layout = hopper.make_smem_layout_epi(self.out, row_major, self.store_tile, self.store_stages)
        x_load, X = self._load_atom(X, x_layout, (tile_m, tile_k), self.cluster[1])
        w_load, W = self._load_atom(W, w_layout, (tile_n, tile_k), self.cluster[0])
        y_store, Y = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), Y, cute.slice_(y_layout, (None, None, 0)), self.store_tile
        )

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, self.stages * 2]
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(x_layout)], 1024]
            w: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(w_layout)], 1024]
            y: cute.struct.Align[cute.struct.MemRange[self.out, cute.cosize(y_layout)], 1024]

        self.shared = Shared
        clusters = sms // (self.cluster[0] * self.cluster[1])
        rows = cute.make_tensor(rows, cute.make_layout(1))
        self.kernel(
            x_load, X, w_load, W, y_store, Y, E, rows, mma, x_layout, w_layout, y_layout, capacity, n, k
        ).launch(
            grid=(self.cluster[0], self.cluster[1], clusters),
            block=(self.threads, 1, 1),
            cluster=(*self.cluster, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @staticmethod
    def _load_atom(tensor, layout, shape, multicast):
        op = cpasync.CopyBulkTensorTileG2SMulticastOp() if multicast > 1 else cpasync.CopyBulkTensorTileG2SOp()
        one_stage = cute.slice_(layout, (None, None, 0))
        return cpasync.make_tiled_tma_atom(op, tensor, one_stage, shape, num_multicast=multicast)

    @cute.jit
    def _tile_of(self, work: Int32, m_tiles: Int32, n_tiles: Int32):
        """Work item → (m, n) in clusters: ``group`` columns of tiles at a time, N fastest within a group."""
        first = work // (m_tiles * self.group) * self.group
        width = cutlass.min(n_tiles - first, Int32(self.group))
        rest = work - first * m_tiles
        return rest // width, first + rest % width

    @cute.kernel
    def kernel(
        self,
        x_load: cute.CopyAtom,
        X: cute.Tensor,
        w_load: cute.CopyAtom,
        W: cute.Tensor,
        y_store: cute.CopyAtom,
        Y: cute.Tensor,
        E: cute.Tensor,
        rows: cute.Tensor,
        mma: cute.TiledMma,
        x_layout: cute.ComposedLayout,
        w_layout: cute.ComposedLayout,
        y_layout: cute.ComposedLayout,
        capacity: Int32,
        n: Int32,
        k: Int32,
    ):
        tile_m, tile_n, tile_k = self.tile
        thread, _, _ = cute.arch.thread_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group_index = cute.arch.make_warp_uniform(thread // 128)
        _, _, cluster_index = cute.arch.block_idx()
        _, _, num_clusters = cute.arch.grid_dim()
        if warp_index == 0:
            for atom in (x_load, w_load, y_store):
                cpasync.prefetch_descriptor(atom)

        cluster = cute.make_layout((*self.cluster, 1))
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        rank_m, rank_n, _ = cluster.get_flat_coord(rank)
        x_mask = w_mask = 0
        if const_expr(self.cluster[1] > 1):
            x_mask = cute.make_layout_image_mask(cluster, (rank_m, rank_n, 0), mode=1)
        if const_expr(self.cluster[0] > 1):
            w_mask = cute.make_layout_image_mask(cluster, (rank_m, rank_n, 0), mode=0)

        shared = SmemAllocator().allocate(self.shared)
        # Every consumer warp frees a stage in each CTA that multicasts into it.
        releases = (self.cluster[0] + self.cluster[1] - 1) * self.consumers * 4
        ring = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=self.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, releases),
            tx_count=(tile_m + tile_n) * tile_k * 2,
            cta_layout_vmnk=cute.make_layout((1, *self.cluster, 1)),
            defer_sync=True,
        )
        pipeline.pipeline_init_arrive(cluster_shape_mn=self.cluster, is_relaxed=True)
        sX = shared.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        sW = shared.w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
        sY = shared.y.get_tensor(y_layout.outer, swizzle=y_layout.inner)
        pipeline.pipeline_init_wait(cluster_shape_mn=self.cluster)

        k_tiles = cute.ceil_div(k, tile_k)
        m_tiles = cute.ceil_div(rows[0], tile_m * self.cluster[0])
        n_tiles = cute.ceil_div(n, tile_n * self.cluster[1])
        if group_index == 0:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_index == 0:
                gX = cute.local_tile(X, (tile_m, tile_k), (None, None))
                gW = cute.local_tile(W, (tile_n, tile_k), (None, None))
                across_n, across_m = cute.make_layout(self.cluster[1]), cute.make_layout(self.cluster[0])
                to_x, from_x = self._partition(x_load, rank_n, across_n, sX, gX)
                to_w, from_w = self._partition(w_load, rank_m, across_m, sW, gW)
                state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
                work = Int32(cluster_index)
                while work < m_tiles * n_tiles:
                    m, column = self._tile_of(work, m_tiles, n_tiles)
                    from_x_row = from_x[(None, m * self.cluster[0] + rank_m, None)]
                    from_w_row = from_w[(None, column * self.cluster[1] + rank_n, None)]
                    for k_tile in cutlass.range(k_tiles, unroll=1):
                        ring.producer_acquire(state)
                        full = ring.producer_get_barrier(state)
                        at = (None, state.index)
                        cute.copy(x_load, from_x_row[(None, k_tile)], to_x[at], tma_bar_ptr=full, mcast_mask=x_mask)
                        cute.copy(w_load, from_w_row[(None, k_tile)], to_w[at], tma_bar_ptr=full, mcast_mask=w_mask)
                        state.advance()
                    work += num_clusters
                ring.producer_tail(state)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[self.consumers])
            self._consume(
                ring, mma, sX, sW, sY, y_store, Y, E, thread - 128, rank_m, rank_n, m_tiles, n_tiles, k_tiles, capacity
            )

    @staticmethod
    def _partition(atom, rank, peers, shared, tiled):
        return cpasync.tma_partition(atom, rank, peers, cute.group_modes(shared, 0, 2), cute.group_modes(tiled, 0, 2))

    @cute.jit
    def _consume(
        self, ring, mma, sX, sW, sY, y_store, Y, E, thread, rank_m, rank_n, m_tiles, n_tiles, k_tiles, capacity
    ):
        tile_m, tile_n, _ = self.tile
        _, _, cluster_index = cute.arch.block_idx()
        _, _, num_clusters = cute.arch.grid_dim()
        group = cute.arch.make_warp_uniform(thread // 128)
        warp_index = cute.arch.make_warp_uniform(thread // 32)
        slice_mma = mma.get_slice(group * 128)
        rX = mma.make_fragment_A(slice_mma.partition_A(sX))
        rW = mma.make_fragment_B(slice_mma.partition_B(sW))
        acc = cute.make_rmem_tensor(slice_mma.partition_shape_C((tile_m, tile_n)), Float32)

        # Registers → shared memory: stmatrix for 16-bit outputs, in the layout of the accumulators.
        store_atom = hopper.get_smem_store_op(LayoutEnum.ROW_MAJOR, self.out, Float32)
        matrix_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16)
        to_shared = cute.make_tiled_copy_S(store_atom, cute.make_tiled_copy_C_atom(matrix_atom, mma))
        thread_store = to_shared.get_slice(thread)
        tY = thread_store.partition_D(sY)
        flat_acc = to_shared.retile(acc)
        rY = cute.make_rmem_tensor(cute.shape(thread_store.partition_S(sY))[:3], self.out)

        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        release = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        together = pipeline.NamedBarrier(barrier_id=1, num_threads=self.consumers * 128)
        writers = pipeline.CooperativeGroup(pipeline.Agent.Thread, self.consumers * 128)
        stores = pipeline.PipelineTmaStore.create(num_stages=self.store_stages, producer_group=writers)
        gY = cute.local_tile(Y, (tile_m, self.out_n), (None, None))
        E_pairs = cute.recast_tensor(E, Int32)
        row_in_tile = (thread // 32) * 16 + thread % 32 // 4
        pair_in_block = thread % 4
        stored = Int32(0)
        work = Int32(cluster_index)
        while work < m_tiles * n_tiles:
            m, column = self._tile_of(work, m_tiles, n_tiles)
            m = m * self.cluster[0] + rank_m
            column = column * self.cluster[1] + rank_n
            # Bias and residual are where the sum starts: no registers of their own, no pass after the products.
            if const_expr(self.epilogue in ("bias", "residual")):
                pair = cute.make_rmem_tensor(2, BFloat16)
                pair_bits = cute.recast_tensor(pair, Int32)
                for half in cutlass.range_constexpr(2):
                    row = m * tile_m + row_in_tile + 8 * half
                    if row < capacity:
                        for block in cutlass.range_constexpr(tile_n // 8):
                            pair_bits[0] = E_pairs[row, (column * tile_n + block * 8) // 2 + pair_in_block]
                            flat_acc[block * 4 + half * 2] = pair[0].to(Float32)
                            flat_acc[block * 4 + half * 2 + 1] = pair[1].to(Float32)
            mma.set(warpgroup.Field.ACCUMULATE, self.epilogue in ("bias", "residual"))
            for k_tile in cutlass.range(k_tiles, unroll=1):
                ring.consumer_wait(read)
                warpgroup.fence()
                for block in cutlass.range_constexpr(cute.size(rX, mode=[2])):
                    at = (None, None, block, read.index)
                    cute.gemm(mma, acc, rX[at], rW[at], acc)
                    mma.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                # One product stays in flight; the stage of the one before it is free.
                if k_tile > 0:
                    warpgroup.wait_group(1)
                    ring.consumer_release(release)
                    release.advance()
                read.advance()
            warpgroup.wait_group(0)
            ring.consumer_release(release)
            release.advance()

            pieces = cute.zipped_divide(gY[(None, None, m, column)], self.store_tile)
            from_shared, to_y = cpasync.tma_partition(
                y_store, 0, cute.make_layout(1), cute.group_modes(sY, 0, 2), pieces
            )
            for piece in cutlass.range_constexpr(self.out_n // self.store_tile[1]):
                self._finish(flat_acc, rY, piece)
                buffer = (stored + piece) % self.store_stages
                if warp_index == 0:
                    stores.producer_acquire()
                together.arrive_and_wait()  # the buffer's last store has read it
                cute.copy(to_shared, rY, tY[(None, None, None, buffer)])
                cute.arch.fence_proxy("async.shared", space="cta")
                together.arrive_and_wait()
                if warp_index == 0:
                    cute.copy(y_store, from_shared[(None, buffer)], to_y[(None, (0, piece))])
                    stores.producer_commit()
            stored += self.out_n // self.store_tile[1]
            work += num_clusters
        stores.producer_tail()

    @cute.jit
    def _finish(self, acc, rY, piece: cutlass.Constexpr):
        """Accumulators of one store tile → output values; a thread holds blocks of 8 columns as 4 values each."""
        size = cute.size(rY)
        for i in cutlass.range_constexpr(size):
            if const_expr(self.epilogue == "swiglu"):
                # W alternates 8 gate rows and 8 up rows: this thread holds both halves of each output.
                at = 8 * (piece * size // 4 + i // 4) + i % 4
                gate, up = acc[at], acc[at + 4]
                silu = gate * cute.arch.rcp_approx(1.0 + cute.math.exp(-gate, fastmath=True))
                rY[i] = (silu * up).to(self.out)
            else:
                rY[i] = acc[piece * size + i].to(self.out)


def build(
    tile_m: int, tile_n: int, cluster_m: int, cluster_n: int, group: int, epilogue: Any, out: str
) -> tuple[Any, tuple[Any, ...]]:
    """The jit function and example arguments of one configuration."""
    out_type = getattr(cutlass, out)
    gemm = Gemm(GemmTile(tile_m, tile_n, cluster_m, cluster_n, group), epilogue, out_type)

    def pointer(dtype: Any, align: int = 16) -> Any:
        return make_ptr(dtype, 16, cute.AddressSpace.gmem, assumed_align=align)

    sizes = (Int32(128), Int32(256), Int32(256), Int32(132))
    tensors = (pointer(BFloat16), pointer(BFloat16), pointer(out_type), pointer(BFloat16), pointer(Int32, 4))
    return gemm, (*tensors, *sizes, make_fake_stream())
