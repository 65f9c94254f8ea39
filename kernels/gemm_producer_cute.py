"""Device side of the dense GEMM: the producer warp, which fills the ring (see gemm_cute.py for what it carries)."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, const_expr, cute, pipeline
from cutlass._mlir.dialects.nvvm import MemScopeKind

from nf.kernels.gemm_units_cute import GemmUnits


class Operand(NamedTuple):
    """How tiles of x or W get into shared memory."""

    atom: Any
    tiles: Any  # in global memory, (box, tile, K tile, and of W the expert)
    stages: Any  # in shared memory, (box, stage)
    mask: Any  # CTAs of the cluster that get it as well
    policy: int | None  # of L2


class GemmProducer(GemmUnits):
    """What the producer warp does."""

    @cute.jit
    def _produce(
        self, ring, left_load, left, right_load, right, s_left, s_right, e_load, E, sE, has_rows, room, drained,
        tile_experts, cluster, place, m_tiles, n_tiles, k, group,
    ):  # fmt: skip
        rank_m, rank_n, rank_k = place
        _, _, cta_index = cute.arch.block_idx()
        _, _, num_ctas = cute.arch.grid_dim()
        left, right = self._operands(left_load, left, right_load, right, s_left, s_right, cluster, place)
        weights, rows = (left, right) if self.swap else (right, left)
        to_e, from_e = None, None
        if const_expr(sE is not None):
            ge = cute.local_tile(E, (64, self.store_columns), (None, None))
            to_e, from_e = self._partition(e_load, 0, cute.make_layout(1), sE, ge)

        k_first, k_last = self._share_of(cute.ceil_div(k, self.tile[2]), rank_k)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        work = Int32(cta_index // self.split)
        clusters = num_ctas // self.split
        # W does not depend on the kernel before: the first stages of it are on their way while that one ends.
        early, done = Int32(0), Int32(0)
        if const_expr(not self.grouped):
            if work < m_tiles * n_tiles:
                early = cutlass.min(k_last - k_first, Int32(self.stages))
                m, column = self._tile_of(work, m_tiles, n_tiles, group)
                state = self._load_ahead(ring, state, weights, m, column, place, k_first, early, self.swap, True)
                if const_expr(self.swap):
                    self._bring_near(weights, m * self.cluster[0] + rank_m, k_first + early, k_last)
        if const_expr(self.residents > 1):
            cute.arch.griddepcontrol_launch_dependents()  # the next kernel finds room beside this one
        cute.arch.griddepcontrol_wait()
        if const_expr(not self.grouped):
            if early > 0:
                again = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
                m, column = self._tile_of(work, m_tiles, n_tiles, group)
                self._load_ahead(ring, again, rows, m, column, place, k_first, early, not self.swap, False)

        while work < m_tiles * n_tiles:
            m, column = self._tile_of(work, m_tiles, n_tiles, group)
            m = m * self.cluster[0] + rank_m
            column = column * self.cluster[1] + rank_n
            from_left = left.tiles[(None, m, None)]
            if const_expr(self.grouped):
                from_right = right.tiles[(None, column, None, tile_experts[m])]
            else:
                from_right = right.tiles[(None, column, None)]
            for k_tile in cutlass.range(k_first + early, k_last, unroll=1):
                ring.producer_acquire(state)
                full = ring.producer_get_barrier(state)
                self._load(left, from_left[(None, k_tile)], state.index, full)
                self._load(right, from_right[(None, k_tile)], state.index, full)
                state.advance()
            early = Int32(0)
            if const_expr(self.split > 1):
                cute.arch.mbarrier_wait(drained, (done & 1) ^ 1)
                done += 1
                state = self._make_room(ring, state, room, place)
            if const_expr(sE is not None):
                state = self._load_extra(ring, state, e_load, from_e, to_e, m, column, rank_k, has_rows)
            work += clusters
        if const_expr(self.residents == 1):
            cute.arch.griddepcontrol_launch_dependents()  # as this kernel's last tiles are multiplied and stored
        ring.producer_tail(state)

    @cute.jit
    def _operands(self, left_load, left, right_load, right, s_left, s_right, cluster, place):
        """The left and the right operand, as the CTA at this place in its cluster loads them."""
        tile_m, tile_n, tile_k = self.tile
        rank_m, rank_n, _ = place
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
        return (
            Operand(left_load, from_left, to_left, left_mask, self.left_policy),
            Operand(right_load, from_right, to_right, right_mask, self.right_policy),
        )

    @staticmethod
    def _load(operand, source, stage, full):
        hint = {} if operand.policy is None else {"cache_policy": Int64(operand.policy)}
        target = operand.stages[(None, stage)]
        cute.copy(operand.atom, source, target, tma_bar_ptr=full, mcast_mask=operand.mask, **hint)

    @cute.jit
    def _load_ahead(
        self, ring, state, operand, m, column, place, k_first, count, is_left: cutlass.Constexpr,
        acquire: cutlass.Constexpr,
    ):  # fmt: skip
        """The first ``count`` K tiles of one operand alone → the stages from ``state`` on; the place behind them."""
        tile = m * self.cluster[0] + place[0] if is_left else column * self.cluster[1] + place[1]
        source = operand.tiles[(None, tile, None)]
        for k_tile in cutlass.range(count, unroll=1):
            if const_expr(acquire):
                ring.producer_acquire(state)
            self._load(operand, source[(None, k_first + k_tile)], state.index, ring.producer_get_barrier(state))
            state.advance()
        return state

    @cute.jit
    def _bring_near(self, weights, tile, k_next, k_last):
        """The K tiles of W behind those in the ring → L2, a few of them: memory is read on while all wait for x."""
        source = weights.tiles[(None, tile, None)]
        for k_tile in cutlass.range(k_next, cutlass.min(k_next + self.near_tiles, k_last), unroll=1):
            cute.prefetch(weights.atom, source[(None, k_tile)])

    @cute.jit
    def _make_room(self, ring, state, room, place):
        """Set stages aside for the partial sums of the peers, and tell them; the place behind them."""
        for first in cutlass.range_constexpr(0, self.parts, self.parts_per_stage):
            parts = min(self.parts_per_stage, self.parts - first)
            ring.sync_object_empty.wait(state.index, state.phase)
            with cute.arch.elect_one():
                bytes_ = parts * self.consumers * 128 * self.unit_values * 4
                cute.arch.mbarrier_arrive_and_expect_tx(ring.producer_get_barrier(state), bytes_)
            state.advance()
        with cute.arch.elect_one():
            for step in cutlass.range_constexpr(1, self.split):
                peer = self._peer(place, (place[2] + step) % self.split)
                cute.arch.mbarrier_arrive(room, peer, scope=MemScopeKind.CLUSTER)
        return state

    @cute.jit
    def _load_extra(self, ring, state, e_load, from_e, to_e, m, column, rank_k, has_rows):
        """Residual or bias of the units that this CTA finishes → stages; the place behind them."""
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
        return state
