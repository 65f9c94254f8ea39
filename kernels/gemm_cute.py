"""Device side of the dense GEMM: y = epilogue(x·Wᵀ) on Hopper, written in the CuTe DSL.

One producer warp streams tiles of both operands through a ring of shared-memory stages with TMA (multicast across the
cluster); one or two consumer warpgroups multiply them with WGMMA. CTAs are persistent: every cluster walks the tiles in
steps of the number of clusters. The scheme is that of CUTLASS 3's warp-specialised cooperative kernels for sm_90; each
warpgroup finishes and stores its own rows alone, so one may multiply while the other stores.

Two things are there for few rows. The CTAs of a cluster can split K: each adds up its share, and they exchange partial
sums through distributed shared memory so that every CTA finishes an equal part of the tile. And the operands can be
swapped (W·xᵀ), so that the 64 rows of a WGMMA are rows of W and its narrow side is the tokens.

The ring carries, for each tile of a CTA and in this order: its share of the K tiles, both operands to a stage; if K is
split, stages that the peers write their partial sums to; the residual or bias of the units that this CTA finishes. All
warps walk the same sequence, so the number of tiles done tells in which stage something stands, in a peer's ring too
(GemmUnits._send). Of a consumer's two places in the ring, ``read`` is the stage it waits for next, and ``release`` the
oldest that a product may still be reading.

The number of rows is read from device memory, so one captured launch serves every smaller batch. Rows between that
number and the end of the last tile come out as garbage unless the operands are swapped; rows from ``capacity`` on are
never touched. The row count and W are read before the kernel before has ended (programmatic dependent launch), all else
after it; with experts everything is, since that kernel counts the rows.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64, const_expr, cute, pipeline
from cutlass._mlir.dialects.nvvm import MemScopeKind
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from nf.kernels.gemm_units_cute import TILE_K, GemmTile, GemmUnits

PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = {1: 240, 2: 232}  # per thread, by number of consumer warpgroups
ROW_MAJOR = LayoutEnum.ROW_MAJOR


class Gemm(GemmUnits):
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

    def _mma(self, warpgroups):
        major = OperandMajorMode.K
        shape = (64, self.tile[1])
        return hopper.make_trivial_tiled_mma(BFloat16, BFloat16, major, major, Float32, (warpgroups, 1, 1), shape)

    @staticmethod
    def _load_atom(tensor, layout, shape, multicast):
        op = cpasync.CopyBulkTensorTileG2SMulticastOp() if multicast > 1 else cpasync.CopyBulkTensorTileG2SOp()
        one_stage = cute.slice_(layout, (None, None, 0))
        return cpasync.make_tiled_tma_atom(op, tensor, one_stage, shape, num_multicast=multicast)

    @cute.jit
    def _tile_of(self, work: Int32, m_tiles: Int32, n_tiles: Int32, group: Int32):
        """Work item → (m, n) in clusters: ``group`` columns of tiles at a time, N fastest within a group."""
        first = work // (m_tiles * group) * group
        width = cutlass.min(n_tiles - first, group)
        rest = work - first * m_tiles
        return rest // width, first + rest % width

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
            cute.arch.griddepcontrol_wait()  # the kernel before sorts the rows by expert and counts them
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
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[self.consumers])
            self._consume(
                ring, mma, s_left, s_right, sY, sE_read, received, room, drained, y_store, Y, E, thread - 128,
                place, m_tiles, n_tiles, k, group, valid, n,
            )  # fmt: skip

    @staticmethod
    def _partition(atom, rank, peers, shared, tiled):
        return cpasync.tma_partition(atom, rank, peers, cute.group_modes(shared, 0, 2), cute.group_modes(tiled, 0, 2))

    @staticmethod
    def _load(atom, source, target, full, mask, policy):
        hint = {} if policy is None else {"cache_policy": Int64(policy)}
        cute.copy(atom, source, target, tma_bar_ptr=full, mcast_mask=mask, **hint)

    @cute.jit
    def _produce(
        self, ring, left_load, left, right_load, right, s_left, s_right, e_load, E, sE, has_rows, room, drained,
        tile_experts, cluster, place, m_tiles, n_tiles, k, group,
    ):  # fmt: skip
        tile_m, tile_n, tile_k = self.tile
        rank_m, rank_n, rank_k = place
        _, _, cta_index = cute.arch.block_idx()
        _, _, num_ctas = cute.arch.grid_dim()
        left_mask = right_mask = 0
        if const_expr(self.cluster[1] > 1):
            left_mask = cute.make_layout_image_mask(cluster, place, mode=1)
        if const_expr(self.cluster[0] > 1):
            right_mask = cute.make_layout_image_mask(cluster, place, mode=0)
        gl = cute.local_tile(left, (tile_m, tile_k), (None, None))
        across_n, across_m = cute.make_layout(self.cluster[1]), cute.make_layout(self.cluster[0])
        to_left, from_left = self._partition(left_load, rank_n, across_n, s_left, gl)
        gr = cute.local_tile(right, (tile_n, tile_k), (None, None, None) if self.grouped else (None, None))
        to_right, from_right = self._partition(right_load, rank_m, across_m, s_right, gr)
        to_e, from_e = None, None
        if const_expr(sE is not None):
            ge = cute.local_tile(E, (64, self.store_columns), (None, None))
            to_e, from_e = self._partition(e_load, 0, cute.make_layout(1), sE, ge)

        k_tiles = cute.ceil_div(k, tile_k)
        k_first, k_last = self._share_of(k_tiles, rank_k)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        work = Int32(cta_index // self.split)
        clusters = num_ctas // self.split
        # W does not depend on the kernel before: the first stages of it are on their way while that one ends.
        early, done = Int32(0), Int32(0)
        if const_expr(not self.grouped):
            if work < m_tiles * n_tiles:
                early = cutlass.min(k_last - k_first, Int32(self.stages))
                m, column = self._tile_of(work, m_tiles, n_tiles, group)
                from_l = from_left[(None, m * self.cluster[0] + rank_m, None)]
                from_r = from_right[(None, column * self.cluster[1] + rank_n, None)]
                for k_tile in cutlass.range(early, unroll=1):
                    ring.producer_acquire(state)
                    full, at = ring.producer_get_barrier(state), (None, state.index)
                    if const_expr(self.swap):
                        source = from_l[(None, k_first + k_tile)]
                        self._load(left_load, source, to_left[at], full, left_mask, self.left_policy)
                    else:
                        source = from_r[(None, k_first + k_tile)]
                        self._load(right_load, source, to_right[at], full, right_mask, self.right_policy)
                    state.advance()
        if const_expr(self.residents > 1):
            cute.arch.griddepcontrol_launch_dependents()  # the next kernel finds room beside this one
        cute.arch.griddepcontrol_wait()
        if const_expr(not self.grouped):
            if early > 0:
                again = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
                m, column = self._tile_of(work, m_tiles, n_tiles, group)
                from_l = from_left[(None, m * self.cluster[0] + rank_m, None)]
                from_r = from_right[(None, column * self.cluster[1] + rank_n, None)]
                for k_tile in cutlass.range(early, unroll=1):
                    full, at = ring.producer_get_barrier(again), (None, again.index)
                    if const_expr(self.swap):
                        source = from_r[(None, k_first + k_tile)]
                        self._load(right_load, source, to_right[at], full, right_mask, self.right_policy)
                    else:
                        source = from_l[(None, k_first + k_tile)]
                        self._load(left_load, source, to_left[at], full, left_mask, self.left_policy)
                    again.advance()

        while work < m_tiles * n_tiles:
            m, column = self._tile_of(work, m_tiles, n_tiles, group)
            m = m * self.cluster[0] + rank_m
            column = column * self.cluster[1] + rank_n
            from_l = from_left[(None, m, None)]
            if const_expr(self.grouped):
                from_r = from_right[(None, column, None, tile_experts[m])]
            else:
                from_r = from_right[(None, column, None)]
            for k_tile in cutlass.range(k_first + early, k_last, unroll=1):
                ring.producer_acquire(state)
                full, at = ring.producer_get_barrier(state), (None, state.index)
                self._load(left_load, from_l[(None, k_tile)], to_left[at], full, left_mask, self.left_policy)
                self._load(right_load, from_r[(None, k_tile)], to_right[at], full, right_mask, self.right_policy)
                state.advance()
            early = Int32(0)
            if const_expr(self.split > 1):
                cute.arch.mbarrier_wait(drained, (done & 1) ^ 1)
                done += 1
                for first in cutlass.range_constexpr(0, self.parts, self.parts_per_stage):
                    parts = min(self.parts_per_stage, self.parts - first)
                    ring.sync_object_empty.wait(state.index, state.phase)
                    with cute.arch.elect_one():
                        bytes_ = parts * self.consumers * 128 * self.unit_values * 4
                        cute.arch.mbarrier_arrive_and_expect_tx(ring.producer_get_barrier(state), bytes_)
                    state.advance()
                with cute.arch.elect_one():
                    for step in cutlass.range_constexpr(1, self.split):
                        peer = self._peer(place, (rank_k + step) % self.split)
                        cute.arch.mbarrier_arrive(room, peer, scope=MemScopeKind.CLUSTER)
            if const_expr(sE is not None):
                for first in cutlass.range_constexpr(0, self.owned, self.extras_per_stage):
                    units = min(self.extras_per_stage, self.owned - first)
                    ring.sync_object_empty.wait(state.index, state.phase)
                    full = ring.producer_get_barrier(state)
                    with cute.arch.elect_one():
                        bytes_ = units * self.consumers * 64 * self.store_columns * 2
                        cute.arch.mbarrier_arrive_and_expect_tx(full, bytes_)
                    for unit in cutlass.range_constexpr(units):
                        block, piece = self._place_of(first + unit, rank_k)
                        for wg in cutlass.range_constexpr(self.consumers):
                            row = ((m * self.row_blocks + block) * self.consumers + wg) * has_rows
                            slot = state.index * self.units_per_block + unit * self.consumers + wg
                            source = from_e[(None, row, column * self.units_per_block + piece)]
                            cute.copy(e_load, source, to_e[(None, slot)], tma_bar_ptr=full)
                    state.advance()
            work += clusters
        if const_expr(self.residents == 1):
            cute.arch.griddepcontrol_launch_dependents()  # as this kernel's last tiles are multiplied and stored
        ring.producer_tail(state)

    @cute.jit
    def _consume(
        self, ring, mma, s_left, s_right, sY, sE, received, room, drained, y_store, Y, E, thread, place,
        m_tiles, n_tiles, k, group, valid, n,
    ):  # fmt: skip
        tile_m, tile_n, tile_k = self.tile
        rank_m, rank_n, rank_k = place
        _, _, cta_index = cute.arch.block_idx()
        _, _, num_ctas = cute.arch.grid_dim()
        wg = cute.arch.make_warp_uniform(thread // 128)
        lane = thread % 128  # within the warpgroup
        leader = cute.arch.make_warp_uniform(lane // 32) == 0  # its first warp issues the stores
        slice_mma = mma.get_slice(wg * 128)
        r_left = mma.make_fragment_A(slice_mma.partition_A(s_left))
        r_right = mma.make_fragment_B(slice_mma.partition_B(s_right))
        acc = cute.make_rmem_tensor(slice_mma.partition_shape_C((tile_m, tile_n)), Float32)
        flat = cute.make_tensor(acc.iterator, cute.make_layout(cute.size(acc)))
        # Sums of the units that this CTA finishes: all of the accumulators, or a copy of its share.
        sums = flat if const_expr(self.split == 1) else cute.make_rmem_tensor(self.owned * self.unit_values, Float32)

        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        release = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        k_tiles = cute.ceil_div(k, tile_k)
        k_first, k_last = self._share_of(k_tiles, rank_k)
        together = pipeline.NamedBarrier(barrier_id=1 + wg, num_threads=128)
        to_shared, tY, rY, from_shared, to_y = None, None, None, None, None
        from_e, tE, rE, rE_load = None, None, None, None
        if const_expr(not self.swap):
            # Registers → shared memory with stmatrix, in the layout of the accumulators of one warpgroup.
            atom = hopper.get_smem_store_op(ROW_MAJOR, self.out, Float32)
            matrix_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16)
            one_warpgroup = cute.make_tiled_copy_C_atom(matrix_atom, self._mma(1))
            to_shared = cute.make_tiled_copy_S(atom, one_warpgroup)
            thread_store = to_shared.get_slice(lane)
            tY = thread_store.partition_D(sY)
            rY = cute.make_rmem_tensor(cute.shape(thread_store.partition_S(sY))[:3], self.out)
            gY = cute.local_tile(Y, (64, self.store_columns), (None, None))
            from_shared, to_y = self._partition(y_store, 0, cute.make_layout(1), sY, gY)
            if const_expr(sE is not None):
                from_e = cute.make_tiled_copy_S(
                    cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16), one_warpgroup
                )
                thread_load = from_e.get_slice(lane)
                tE = thread_load.partition_S(sE)
                rE = cute.make_rmem_tensor(rY.layout, BFloat16)
                rE_load = thread_load.retile(rE)
        else:
            cute.arch.griddepcontrol_wait()  # these threads read the residual and write y themselves

        stored, done = Int32(0), Int32(0)
        work = Int32(cta_index // self.split)
        clusters = num_ctas // self.split
        while work < m_tiles * n_tiles:
            m, column = self._tile_of(work, m_tiles, n_tiles, group)
            m = m * self.cluster[0] + rank_m
            column = column * self.cluster[1] + rank_n
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for k_tile in cutlass.range(k_last - k_first, unroll=1):
                ring.consumer_wait(read)
                warpgroup.fence()
                for block in cutlass.range_constexpr(cute.size(r_left, mode=[2])):
                    at = (None, None, block, read.index)
                    cute.gemm(mma, acc, r_left[at], r_right[at], acc)
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

            if const_expr(self.split > 1):
                cute.arch.mbarrier_wait(room, done & 1)
                for owner in cutlass.range_constexpr(self.split):
                    if rank_k != owner:
                        self._send(ring, flat, received, place, wg, lane, owner, k_tiles, done)
                self._take(flat, sums, rank_k)
                # Partial sums of the peers, added in the order of their slots.
                for part in cutlass.range_constexpr(self.parts):
                    at = part % self.parts_per_stage
                    start = part // (self.split - 1) * self.unit_values
                    if const_expr(at == 0):
                        ring.consumer_wait(read)
                    for quad in cutlass.range_constexpr(self.unit_values // 4):
                        values = received[(None, lane, quad, wg, at, read.index)].load()
                        for i in cutlass.range_constexpr(4):
                            sums[start + quad * 4 + i] = sums[start + quad * 4 + i] + values[i]
                    if const_expr(at == self.parts_per_stage - 1 or part == self.parts - 1):
                        cute.arch.fence_proxy("async.shared", space="cta")
                        ring.consumer_release(read)
                        read.advance()
                        release.advance()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(drained)
                done += 1
            if const_expr(sE is not None):
                read, release = self._read_extra(ring, read, release, 0, wg, from_e, tE, rE_load)
            for index in cutlass.range_constexpr(self.owned):
                mine = cute.make_tensor(sums.iterator + index * self.unit_values, cute.make_layout(self.unit_values))
                block, piece = self._place_of(index, rank_k)
                rows_at = (m * self.row_blocks + block) * self.consumers + wg  # in blocks of 64
                if const_expr(self.swap):
                    token = column * tile_n + piece * (self.unit_values * 2)
                    self._store_direct(mine, Y, E, lane, rows_at, token, valid, n)
                else:
                    self._finish(mine, rY, rE)
                    if const_expr(sE is not None and index + 1 < self.owned):  # on its way as this unit is stored
                        read, release = self._read_extra(ring, read, release, index + 1, wg, from_e, tE, rE_load)
                    buffer = wg * self.store_stages + (stored + index) % self.store_stages
                    cute.copy(to_shared, rY, tY[(None, None, None, buffer)])
                    cute.arch.fence_proxy("async.shared", space="cta")
                    # One barrier for two things: this buffer is written, and the next one's last store has read it.
                    if leader:
                        cute.arch.cp_async_bulk_wait_group(self.store_stages - 2, read=True)
                    together.arrive_and_wait()
                    if leader:
                        target = to_y[(None, rows_at, column * self.units_per_block + piece)]
                        cute.copy(y_store, from_shared[(None, buffer)], target)
                        cute.arch.cp_async_bulk_commit_group()
            stored += self.owned
            work += clusters
        if const_expr(not self.swap):
            if leader:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _read_extra(self, ring, read, release, index: cutlass.Constexpr, wg, from_e, tE, rE_load):
        """Residual or bias of the ``index``-th unit → registers; a consumer's two places in the ring, moved on behind
        the stage's last."""
        at = index % self.extras_per_stage
        if const_expr(at == 0):
            ring.consumer_wait(read)
        slot = read.index * self.units_per_block + at * self.consumers + wg
        cute.copy(from_e, tE[(None, None, None, slot)], rE_load)
        if const_expr(at == self.extras_per_stage - 1 or index == self.owned - 1):
            ring.consumer_release(read)
            read.advance()
            release.advance()
        return read, release


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
