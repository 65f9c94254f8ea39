"""Device side of the dense GEMM: the consumer warpgroups, which multiply what stands in the ring and store the sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup
from cutlass.tensor_utils import LayoutEnum

from nf.kernels.gemm_units_cute import GemmUnits

ROW_MAJOR = LayoutEnum.ROW_MAJOR


class Staging(NamedTuple):
    """A warpgroup's way from registers through shared memory to y, and that of a residual or bias into registers."""

    to_shared: Any  # with stmatrix, in the layout of the accumulators of one warpgroup
    values: Any  # output values of a unit that a thread holds
    buffers: Any  # where they go
    store: Any  # TMA
    from_shared: Any  # by buffer
    to_y: Any  # by block of 64 rows and unit
    to_registers: Any = None  # with ldmatrix
    slots: Any = None  # of the ring, with a unit of the residual or bias each
    extra: Any = None  # as ``values``
    extra_loaded: Any = None  # the same, in the order of ldmatrix


class GemmConsumer(GemmUnits):
    """What the consumer warpgroups do."""

    def _mma(self, warpgroups):
        major = OperandMajorMode.K
        shape = (64, self.tile[1])
        return hopper.make_trivial_tiled_mma(BFloat16, BFloat16, major, major, Float32, (warpgroups, 1, 1), shape)

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
        acc = cute.make_rmem_tensor(slice_mma.partition_shape_C((self.mma_rows, tile_n)), Float32)
        flat = cute.make_tensor(acc.iterator, cute.make_layout(cute.size(acc)))
        # Sums of the units that this CTA finishes: all of the accumulators, or a copy of its share.
        sums = flat if const_expr(self.split == 1) else cute.make_rmem_tensor(self.owned * self.unit_values, Float32)

        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        release = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        k_tiles = cute.ceil_div(k, tile_k)
        k_first, k_last = self._share_of(k_tiles, rank_k)
        together = pipeline.NamedBarrier(barrier_id=1 + wg, num_threads=128)
        staging = None
        if const_expr(not self.swap):
            staging = self._staging(y_store, Y, sY, sE, lane)
        else:
            cute.arch.griddepcontrol_wait()  # these threads read the residual and write y themselves

        stored, done = Int32(0), Int32(0)
        work = Int32(cta_index // self.split)
        clusters = num_ctas // self.split
        while work < m_tiles * n_tiles:
            m, column = self._tile_of(work, m_tiles, n_tiles, group)
            m = m * self.cluster[0] + rank_m
            column = column * self.cluster[1] + rank_n
            read, release = self._multiply(ring, read, release, mma, acc, r_left, r_right, k_last - k_first)
            if const_expr(self.split > 1):
                cute.arch.mbarrier_wait(room, done & 1)
                for owner in cutlass.range_constexpr(self.split):
                    if rank_k != owner:
                        self._send(ring, flat, received, place, wg, lane, owner, k_tiles, done)
                self._take(flat, sums, rank_k)
                read, release = self._receive(ring, read, release, sums, received, drained, wg, lane)
                done += 1
            if const_expr(sE is not None):
                read, release = self._read_extra(ring, read, release, 0, wg, staging)
            for index in cutlass.range_constexpr(self.owned):
                mine = cute.make_tensor(sums.iterator + index * self.unit_values, cute.make_layout(self.unit_values))
                block, piece = self._place_of(index, rank_k)
                if const_expr(self.swap):
                    first = m * tile_m + (block * self.consumers + wg) * 64
                    end = n if const_expr(tile_m == self.mma_rows) else cutlass.min((m + 1) * tile_m, n)
                    token = column * tile_n + piece * (self.unit_values * 2)
                    self._store_direct(mine, Y, E, lane, first, end, token, valid)
                else:
                    self._finish(mine, staging.values, staging.extra)
                    if const_expr(sE is not None and index + 1 < self.owned):  # on its way as this unit is stored
                        read, release = self._read_extra(ring, read, release, index + 1, wg, staging)
                    buffer = wg * self.store_stages + (stored + index) % self.store_stages
                    rows_at = (m * self.row_blocks + block) * self.consumers + wg  # in blocks of 64
                    self._store(staging, buffer, rows_at, column, piece, leader, together)
            stored += self.owned
            work += clusters
        if const_expr(not self.swap):
            if leader:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _staging(self, y_store, Y, sY, sE, lane):
        """A thread's part in the stores of its warpgroup; ``sE`` None: nothing is added."""
        atom = hopper.get_smem_store_op(ROW_MAJOR, self.out, Float32)
        matrix_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16)
        one_warpgroup = cute.make_tiled_copy_C_atom(matrix_atom, self._mma(1))
        to_shared = cute.make_tiled_copy_S(atom, one_warpgroup)
        thread_store = to_shared.get_slice(lane)
        buffers = thread_store.partition_D(sY)
        values = cute.make_rmem_tensor(cute.shape(thread_store.partition_S(sY))[:3], self.out)
        gY = cute.local_tile(Y, (64, self.store_columns), (None, None))
        from_shared, to_y = self._partition(y_store, 0, cute.make_layout(1), sY, gY)
        staging = Staging(to_shared, values, buffers, y_store, from_shared, to_y)
        if const_expr(sE is not None):
            matrix_atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
            to_registers = cute.make_tiled_copy_S(matrix_atom, one_warpgroup)
            thread_load = to_registers.get_slice(lane)
            slots = thread_load.partition_S(sE)
            extra = cute.make_rmem_tensor(values.layout, BFloat16)
            staging = staging._replace(
                to_registers=to_registers, slots=slots, extra=extra, extra_loaded=thread_load.retile(extra)
            )
        return staging

    @cute.jit
    def _multiply(self, ring, read, release, mma, acc, r_left, r_right, k_tiles):
        """A CTA's share of a tile's K → ``acc``; a consumer's two places in the ring."""
        mma.set(warpgroup.Field.ACCUMULATE, False)
        for k_tile in cutlass.range(k_tiles, unroll=1):
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
        return read, release

    @cute.jit
    def _send(self, ring, flat, received, place, wg, lane, owner: cutlass.Constexpr, k_tiles, done):
        """Partial sums of the units that rank ``owner`` finishes → the stages its producer has set aside for them.

        Their place in the owner's ring follows from the number of tiles done; the slot of a sender depends on both
        ranks alone, so sums are added in a fixed order.
        """
        _, _, rank_k = place
        first, last = self._share_of(k_tiles, owner)
        behind = (done + 1) * (last - first) + done * (self.part_stages + self.extra_stages)
        slot = (rank_k - owner - 1 + self.split) % self.split
        peer = self._peer(place, owner)
        for index in cutlass.range_constexpr(self.owned):
            part = index * (self.split - 1) + slot
            stage = (behind + part // self.parts_per_stage) % self.stages
            full = ring.sync_object_full.get_barrier(stage)
            start = self._first_of(index * self.split + owner)
            for quad in cutlass.range_constexpr(self.unit_values // 4):
                at = start + quad * 4
                values = (flat[at], flat[at + 1], flat[at + 2], flat[at + 3])
                bits = tuple(value.bitcast(Int32) for value in values)
                target = received[(None, lane, quad, wg, part % self.parts_per_stage, stage)].iterator.align(16)
                cute.arch.store_async_dsmem(target, bits, full, peer)

    def _first_of(self, unit):
        """First accumulator of a unit."""
        return unit // self.units_per_block * self.values + unit % self.units_per_block * self.unit_values

    @cute.jit
    def _take(self, flat, sums, rank_k):
        """Accumulators of this CTA's units → ``sums``."""
        for owner in cutlass.range_constexpr(self.split):
            if rank_k == owner:
                for index in cutlass.range_constexpr(self.owned):
                    start = self._first_of(index * self.split + owner)
                    for i in cutlass.range_constexpr(self.unit_values):
                        sums[index * self.unit_values + i] = flat[start + i]

    @cute.jit
    def _receive(self, ring, read, release, sums, received, drained, wg, lane):
        """Partial sums of the peers, added to ``sums`` in the order of their slots; the two places in the ring."""
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
        return read, release

    @cute.jit
    def _read_extra(self, ring, read, release, index: cutlass.Constexpr, wg, staging):
        """Residual or bias of the ``index``-th unit → registers; a consumer's two places in the ring, moved on behind
        the stage's last, when all of it has arrived: a copy into the stage would overtake a read that is held up."""
        at = index % self.extras_per_stage
        if const_expr(at == 0):
            ring.consumer_wait(read)
        slot = read.index * self.units_per_block + at * self.consumers + wg
        cute.copy(staging.to_registers, staging.slots[(None, None, None, slot)], staging.extra_loaded)
        if const_expr(at == self.extras_per_stage - 1 or index == self.owned - 1):
            cute.arch.fence_proxy("async.shared", space="cta")
            ring.consumer_release(read)
            read.advance()
            release.advance()
        return read, release

    @cute.jit
    def _finish(self, sums, values, extra):
        """Sums of one unit → output values of one store."""
        for i in cutlass.range_constexpr(cute.size(values)):
            if const_expr(self.epilogue == "swiglu"):
                # W alternates 8 gate rows and 8 up rows: this thread holds both halves of each output.
                at = 8 * (i // 4) + i % 4
                values[i] = self._swiglu(sums[at], sums[at + 4]).to(self.out)
            elif const_expr(extra is not None):
                values[i] = (sums[i] + self._widened(extra, i)).to(self.out)
            else:
                values[i] = sums[i].to(self.out)

    @cute.jit
    def _widened(self, extra, i: cutlass.Constexpr):
        """Value ``i`` as fp32, in one instruction: the compiler takes two for the upper of a pair."""
        pair = cute.recast_tensor(extra, Int32)[i // 2]
        return (pair << 16 if const_expr(i % 2 == 0) else pair & Int32(-65536)).bitcast(Float32)

    @cute.jit
    def _swiglu(self, gate, up):
        return gate * up * cute.arch.rcp_approx(1.0 + cute.math.exp(-gate, fastmath=True))

    @cute.jit
    def _store(self, staging, buffer, rows_at, column, piece, leader, together):
        """A unit's output values → y, through one of the warpgroup's buffers."""
        cute.copy(staging.to_shared, staging.values, staging.buffers[(None, None, None, buffer)])
        cute.arch.fence_proxy("async.shared", space="cta")
        # One barrier for two things: this buffer is written, and the next one's last store has read it.
        if leader:
            cute.arch.cp_async_bulk_wait_group(self.store_stages - 2, read=True)
        together.arrive_and_wait()
        if leader:
            target = staging.to_y[(None, rows_at, column * self.units_per_block + piece)]
            cute.copy(staging.store, staging.from_shared[(None, buffer)], target)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def _store_direct(self, sums, Y, E, lane, first, end, token, valid):
        """Swapped operands: a thread holds two rows of W, 8 apart, of the 64 from ``first`` on, and two tokens of every
        8. Rows from ``end`` on are no longer the tile's."""
        token += lane % 4 * 2
        row = first + lane // 32 * 16 + lane % 32 // 4
        if const_expr(self.epilogue == "add"):
            for i in cutlass.range_constexpr(self.unit_values):
                # Clamped, not predicated, so that all loads are in flight together.
                at = cutlass.min(token + i // 4 * 8 + i % 2, valid - 1)
                sums[i] = sums[i] + E[at, cutlass.min(row + i // 2 % 2 * 8, end - 1)].to(Float32)
        for i in cutlass.range_constexpr(self.unit_values):
            at = token + i // 4 * 8 + i % 2
            if const_expr(self.epilogue == "swiglu"):
                if const_expr(i // 2 % 2 == 0):
                    value = self._swiglu(sums[i], sums[i + 2])
                    if at < valid and row < end:
                        Y[at, first // 2 + lane // 32 * 8 + lane % 32 // 4] = value.to(self.out)
            else:
                out = row + i // 2 % 2 * 8
                if at < valid and out < end:
                    Y[at, out] = sums[i].to(self.out)
