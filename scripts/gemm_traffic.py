"""What a GEMM reads from HBM, by a model of the L2 cache: which configuration, order and eviction are worth measuring.

    python scripts/gemm_traffic.py --rows 2048 8192 --cache 25 40

Clusters take tiles in the order in which the kernel gives them out, as many at a time as run at a time, and advance
through K in step. A cache of ``--cache`` MB keeps pieces of x and W, of 512 columns each, and the outputs that pass
through it. What is to be dropped first goes first, what last last, and among equals what was not used for longest. How
much of an H200's 50 MB a GEMM has is not known: both halves may hold a copy of what SMs of either side read.

Printed for each product of a Llama-3-8B layer and for the layer: HBM reads over the fewest possible, today's choice and
the best found.
"""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from nf.bench.gemm_cases import MODELS
from nf.cli.parser import CommandParser
from nf.kernels.gemm import EVICTIONS, GemmChoice, GemmConfig, choose

SMS = 132
PIECE = 512  # columns of x or W that are read at a time
GROUPS = (1, 2, 4, 8, 16)
PRIORITIES = "fnl"  # dropped first, as it comes, last

Piece = tuple[str, int, int]  # of x, W or y: its block of rows (of y its tile), its columns


@dataclass
class Cache:
    """Least recently used within a priority; ``missed`` are the bytes read that were not there."""

    size: float
    missed: float = 0.0
    _used: float = 0.0
    _where: dict[Piece, str] = field(default_factory=dict)
    _queues: dict[str, OrderedDict[Piece, float]] = field(
        default_factory=lambda: {priority: OrderedDict() for priority in PRIORITIES}
    )

    def read(self, piece: Piece, size: float, priority: str) -> None:
        if not self.keep(piece, size, priority):
            self.missed += size

    def keep(self, piece: Piece, size: float, priority: str) -> bool:
        """Put a piece at the end of its queue; whether it was in the cache."""
        there = piece in self._where
        if there:
            self._used -= self._queues[self._where[piece]].pop(piece)
        self._where[piece] = priority
        self._queues[priority][piece] = size
        self._used += size
        while self._used > self.size:
            queue = next(queue for queue in self._queues.values() if queue)
            dropped, dropped_size = queue.popitem(last=False)
            del self._where[dropped]
            self._used -= dropped_size
        return there


def traffic(choice: GemmChoice, n: int, k: int, rows: int, cache_bytes: float, *, output_columns: float = 1.0) -> float:
    """Bytes read from HBM.

    Args:
        output_columns: per column of the product; a half for SwiGLU.
    """
    config = choice.config
    block_m, block_n = config.tile_m * config.cluster_m, config.tile_n * config.cluster_n
    m_blocks, n_blocks = -(-rows // block_m), -(-n // block_n)
    x_evict, w_evict = config.evict or "nn"
    cache = Cache(cache_bytes)
    order = list(tile_order(m_blocks, n_blocks, choice.group))
    at_a_time = config.clusters(SMS)
    for start in range(0, len(order), at_a_time):
        wave = order[start : start + at_a_time]
        for piece in range(-(-k // PIECE)):
            for m in sorted({m for m, _ in wave}):
                cache.read(("x", m, piece), block_m * PIECE * 2, x_evict)
            for column in sorted({column for _, column in wave}):
                cache.read(("w", column, piece), block_n * PIECE * 2, w_evict)
        for m, column in wave:
            cache.keep(("y", m, column), block_m * block_n * 2 * output_columns, "n")
    return cache.missed


def tile_order(m_blocks: int, n_blocks: int, group: int) -> itertools.chain[tuple[int, int]]:
    """(m, n) as the kernel's ``_tile_of`` counts: ``group`` columns at a time, N fastest within a group."""
    groups = (range(first, min(first + group, n_blocks)) for first in range(0, n_blocks, group))
    return itertools.chain.from_iterable(itertools.product(range(m_blocks), columns) for columns in groups)


def variants(config: GemmConfig) -> list[GemmChoice]:
    """A configuration with every eviction and group."""
    return [GemmChoice(replace(config, evict=evict), group) for evict in EVICTIONS for group in GROUPS]


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="of x, several")
    parser.add_argument("--cache", type=float, nargs="+", default=[25.0, 40.0], metavar="MB", help="several")
    args = parser.parse_args()
    if min(*args.rows, *args.cache) <= 0:
        parser.error("--rows, --cache: must be above 0")
    for cache_mb, rows in itertools.product(args.cache, args.rows):
        now = best = least = 0.0
        for name, (n, k) in MODELS["llama-3-8b"].items():
            epilogue, columns = ("swiglu", 0.5) if name == "gate_up" else ("none", 1.0)
            chosen = choose(n, k, rows, SMS, epilogue)
            if chosen.config.swap:
                parser.error(f"--rows: for {rows} the operands of {name} are swapped, which this knows nothing of")
            own = traffic(chosen, n, k, rows, cache_mb * 1e6, output_columns=columns)
            seen = {
                one: traffic(one, n, k, rows, cache_mb * 1e6, output_columns=columns) for one in variants(chosen.config)
            }
            found = min(seen, key=lambda one: seen[one])
            fewest = 2.0 * k * (rows + n)
            print(
                f"{cache_mb:g} MB, {rows} rows, {name}: {chosen.config.label} by {chosen.group} {own / fewest:.2f}, "
                f"{found.config.label} by {found.group} {seen[found] / fewest:.2f}"
            )
            now, best, least = now + own, best + seen[found], least + fewest
        print(
            f"{cache_mb:g} MB, {rows} rows, layer: {now / 1e6:,.0f} MB now, {best / 1e6:,.0f} best, "
            f"{least / 1e6:,.0f} fewest"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
