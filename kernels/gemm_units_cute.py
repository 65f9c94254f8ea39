"""Device side of the dense GEMM: what producer and consumers agree on, the tiles and the units of a tile.

A unit is what a CTA finishes at a time: a few columns of 64 rows per warpgroup. Units of a tile whose K is split are
shared out among the CTAs that share its K; each sends its partial sums of the others' units to their shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cutlass
from cutlass import Int32, const_expr, cute
from cutlass.cute.nvgpu import cpasync

TILE_K = 64  # one 128-byte swizzle row of bf16
SHARED_BYTES = 228 * 1024  # of an SM
SHARED_RESERVED = 1024  # of an SM's 228 KB, by every resident CTA
NEAR_BYTES = 32 * 1024  # of W, behind those in the ring, that a CTA has L2 read before x is there
EVICTION = {"n": None, "f": 0x12F0000000000000, "l": 0x14F0000000000000}
"""L2 cache policies, as ``createpolicy.fractional`` of PTX makes them for all of an access."""


@dataclass(frozen=True, slots=True)
class GemmTile:
    """Shape of the work of one CTA and one cluster; see GemmConfig in gemm.py for what is chosen when."""

    tile_m: int  # rows of the left operand (x, or W when swapped), a multiple of 64 per warpgroup; swapped, of 16
    tile_n: int  # rows of the right operand, a multiple of 16, at most 256
    cluster_m: int
    cluster_n: int
    split: int  # CTAs of a cluster that share the K dimension of one tile
    warpgroups: int  # that multiply: 1 or 2
    swap: bool
    residents: int  # CTAs that share an SM
    evict: str  # how L2 treats x and W, a letter each; see GemmConfig


class GemmUnits:
    """What follows from a tile shape, epilogue and output type.

    A thread holds, for each of its warpgroup's blocks of 64 rows, ``tile_n / 2`` accumulators: 4 for every 8 columns
    (two rows 8 apart, two neighbouring columns each). They are finished in units of a few columns; unit u of the tile
    belongs to the CTA of rank u % split.
    """

    def __init__(
        self, tile: GemmTile, epilogue: Literal["none", "add", "swiglu"], out: Any, *, grouped: bool = False
    ) -> None:
        self.tile = (tile.tile_m, tile.tile_n, TILE_K)
        self.cluster = (tile.cluster_m, tile.cluster_n, tile.split)
        self.split = tile.split
        self.swap = tile.swap
        self.epilogue = epilogue
        self.out = out
        self.grouped = grouped
        self.consumers = tile.warpgroups
        self.threads = 128 * (1 + self.consumers)
        self.row_blocks = -(-tile.tile_m // (64 * self.consumers))
        self.mma_rows = self.row_blocks * 64 * self.consumers
        self.values = tile.tile_n // 2
        longer = max(tile.tile_m, tile.tile_n)
        paired = 2 if epilogue == "swiglu" else 1  # accumulator columns per output column
        if tile.swap:
            self.store_columns, unit_columns = 0, tile.tile_n // tile.split
        else:
            wide = 512 // out.width  # 64 bytes of a row
            part_fits = tile.split == 1 or wide * paired * self.consumers <= longer // 2
            divides = tile.tile_n // paired % (wide * tile.split) == 0
            self.store_columns = wide if divides and part_fits else wide // 2
            unit_columns = self.store_columns * paired
        self.units_per_block = tile.tile_n // unit_columns
        self.units = self.row_blocks * self.units_per_block
        self.unit_values = unit_columns // 2
        self.owned = self.units // tile.split  # units this CTA finishes
        assert tile.tile_n % unit_columns == 0
        assert self.units % tile.split == 0
        assert self.unit_values % 4 == 0
        self.store_stages = 0 if tile.swap else max(2, min(4, self.owned))
        store_bytes = self.consumers * self.store_stages * 64 * self.store_columns * out.width // 8
        stage_bytes = (tile.tile_m + tile.tile_n) * TILE_K * 2
        self.residents = tile.residents
        policies = [EVICTION[letter] for letter in tile.evict] or [None, None]
        self.left_policy, self.right_policy = reversed(policies) if tile.swap else policies
        # Swapped tiles whose ring takes all of this, as 112 × 16, are alone on an SM after all: a KB for y follows.
        shared_bytes = SHARED_BYTES // tile.residents - SHARED_RESERVED
        self.stages = (shared_bytes - 1024 - store_bytes) // stage_bytes
        self.near_tiles = NEAR_BYTES // (tile.tile_m * TILE_K * 2)  # of W, when swapped
        # Behind a tile's operands the ring carries the partial sums of the peers ("parts": one unit of one peer), where
        # the longer operand stands in a stage, and the residual, where the right one stands.
        self.parts = (tile.split - 1) * self.owned
        part_bytes = self.consumers * 128 * self.unit_values * 4
        self.parts_per_stage = max(1, longer * TILE_K * 2 // part_bytes)
        self.part_stages = -(-self.parts // self.parts_per_stage)
        self.extras_per_stage = self.units_per_block // self.consumers
        self.extra_stages = -(-self.owned // self.extras_per_stage) if epilogue == "add" and not tile.swap else 0
        assert self.stages >= max(2, self.part_stages), "the tile is too large for shared memory"
        assert self.mma_rows - tile.tile_m <= self.stages * tile.tile_n  # rows read behind the ring of the left operand
        assert tile.tile_m % (16 if tile.swap else 64) == 0
        assert self.parts == 0 or part_bytes <= longer * TILE_K * 2

    @cute.jit
    def _tile_of(self, work: Int32, m_tiles: Int32, n_tiles: Int32, group: Int32):
        """Work item → (m, n) in clusters: ``group`` columns of tiles at a time, N fastest within a group."""
        first = work // (m_tiles * group) * group
        width = cutlass.min(n_tiles - first, group)
        rest = work - first * m_tiles
        return rest // width, first + rest % width

    @staticmethod
    def _partition(atom, rank, peers, shared, tiled):
        return cpasync.tma_partition(atom, rank, peers, cute.group_modes(shared, 0, 2), cute.group_modes(tiled, 0, 2))

    @cute.jit
    def _share_of(self, k_tiles, rank_k):
        """First K tile of a rank and the one behind its last."""
        return k_tiles * rank_k // self.split, k_tiles * (rank_k + 1) // self.split

    @cute.jit
    def _peer(self, place, owner):
        """Rank in the cluster of the CTA that shares this one's tile with rank ``owner`` along K."""
        return place[0] + self.cluster[0] * (place[1] + self.cluster[1] * owner)

    @cute.jit
    def _place_of(self, index: cutlass.Constexpr, rank_k):
        """The ``index``-th unit of this CTA → (row block of its warpgroup, unit within that block)."""
        unit = index * self.split + rank_k
        if const_expr(self.row_blocks == 1):
            return 0, unit
        return unit // self.units_per_block, unit % self.units_per_block
