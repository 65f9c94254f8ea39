"""Attention over page tables: the same arithmetic for decode and for prefill chunks.

Queries come in tiles of one KV head: a few tokens of one sequence times the query heads of the group. Keys and values
are gathered in chunks of a fixed number of positions that start at multiples of it, and joined by an online softmax
(Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). Every matrix product and every sum has
the same shape whatever the lengths, and a chunk without visible positions does not change a bit. So a token's result
depends on its own sequence alone, and is the same whether the token came by decode or in a prefill chunk, however cut:
that is what lets a preempted request recompute its KV and go on with the same text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.config import ModelConfig
from nf.executors.cpu_gemm import TILE
from nf.scheduler.batch import Int32

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Rows = slice | NDArray[np.intp]

CHUNK = 128  # KV positions per product, rounded to whole pages
GATHER_FLOATS = 1 << 19  # largest gathered or score array, so that it stays in the cache


@dataclass(frozen=True, slots=True)
class TileShape:
    """How queries are cut into tiles; a property of model and page size, not of the batch."""

    kv_heads: int
    group: int  # query heads per KV head
    head_dim: int
    tokens: int  # per tile
    rows: int  # (token, head of the group) per tile: TILE, or a multiple for a larger group
    chunk_pages: int
    page_size: int
    window: int | None  # a token sees itself and the window − 1 positions before

    @classmethod
    def of(cls, config: ModelConfig, page_size: int) -> TileShape:
        group = config.num_heads // config.num_kv_heads
        return cls(
            kv_heads=config.num_kv_heads,
            group=group,
            head_dim=config.head_dim,
            tokens=max(1, TILE // group),
            rows=-(-group // TILE) * TILE,
            chunk_pages=max(1, CHUNK // page_size),
            page_size=page_size,
            window=config.sliding_window,
        )

    @property
    def chunk(self) -> int:
        """KV positions per chunk."""
        return self.chunk_pages * self.page_size

    @property
    def most_tiles(self) -> int:
        """Tiles worked on at a time."""
        return max(1, GATHER_FLOATS // (self.kv_heads * self.chunk * max(self.rows, self.head_dim)))


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of KV positions and the tiles that see some of it."""

    tiles: slice
    pages: Int32  # [tiles or 1, chunk_pages]
    hidden: Bool | None  # [tiles, rows or 1, chunk] positions that must not be seen; None: all are seen by all


@dataclass(frozen=True, slots=True)
class Work:
    """Queries that are attended together; made once per step, used by every layer."""

    rows: Rows  # of the dense batch
    spread: slice  # where these rows go among num_tiles · tokens places
    num_tiles: int
    chunks: tuple[Chunk, ...]


def decode_work(shape: TileShape, page_tables: Int32, kv_lens: Int32, first_row: int) -> tuple[Work, ...]:
    """Work of decode tokens: the row of sequence i is ``first_row + i``.

    Args:
        page_tables: [seqs, pages], filled up with any valid page to whole chunks.
        kv_lens: [seqs] positions visible to each.
    """
    longest_first = np.argsort(-kv_lens, kind="stable")
    return tuple(
        _decode_group(shape, page_tables, kv_lens, longest_first[start : start + shape.most_tiles], first_row)
        for start in range(0, len(kv_lens), shape.most_tiles)
    )


def _decode_group(
    shape: TileShape, page_tables: Int32, kv_lens: Int32, order: NDArray[np.intp], first_row: int
) -> Work:
    lens = kv_lens[order]
    chunks: list[Chunk] = []
    for index in range(-(-int(lens[0]) // shape.chunk)):
        seen = slice(0, int(np.count_nonzero(lens > index * shape.chunk)))
        positions = (lens[seen] - 1)[:, None]
        pages = page_tables[order[seen], index * shape.chunk_pages : (index + 1) * shape.chunk_pages]
        _add_chunk(chunks, shape, index, seen, positions, pages)
    return Work(order + first_row, slice(0, len(order) * shape.tokens, shape.tokens), len(order), tuple(chunks))


def prefill_work(shape: TileShape, page_table: Int32, positions: Int32, first_row: int) -> tuple[Work, ...]:
    """Work of consecutive tokens of one sequence, whose rows start at ``first_row``.

    Args:
        page_table: [pages], filled up to whole chunks.
        positions: [tokens] of the tokens, ascending by one.
    """
    step = shape.most_tiles * shape.tokens
    return tuple(
        _prefill_block(shape, page_table, positions[start : start + step], first_row + start)
        for start in range(0, len(positions), step)
    )


def _prefill_block(shape: TileShape, page_table: Int32, positions: Int32, first_row: int) -> Work:
    count = len(positions)
    num_tiles = -(-count // shape.tokens)
    places = np.minimum(np.arange(num_tiles * shape.tokens), count - 1).reshape(num_tiles, shape.tokens)
    of_row = np.minimum(np.arange(shape.rows) // shape.group, shape.tokens - 1)  # token of each row of a tile
    row_positions = positions[places][:, of_row]  # [tiles, rows]
    chunks: list[Chunk] = []
    for index in range(int(positions[-1]) // shape.chunk + 1):
        first = int(np.count_nonzero(row_positions[:, -1] < index * shape.chunk))
        pages = page_table[None, index * shape.chunk_pages : (index + 1) * shape.chunk_pages]
        _add_chunk(chunks, shape, index, slice(first, num_tiles), row_positions[first:], pages)
    return Work(slice(first_row, first_row + count), slice(0, count), num_tiles, tuple(chunks))


def _add_chunk(chunks: list[Chunk], shape: TileShape, index: int, tiles: slice, positions: Int32, pages: Int32) -> None:
    """Append chunk ``index`` unless nothing in it is visible; ``positions`` are those of the query rows."""
    keys = np.arange(index * shape.chunk, (index + 1) * shape.chunk, dtype=np.int32)
    hidden = keys > positions[:, :, None]
    if shape.window is not None:
        hidden |= keys <= positions[:, :, None] - shape.window
        if hidden.all():
            return
    chunks.append(Chunk(tiles, pages, hidden if hidden.any() else None))


def attend(shape: TileShape, work: Work, q: Float32, keys: Float32, values: Float32, out: Float32) -> None:
    """Attention of some rows over one layer's KV.

    Args:
        q: [rows of the dense batch, heads · head_dim], after rotation.
        keys, values: [kv_heads, pages, page_size, head_dim].
        out: like q; the rows of ``work`` are written.
    """
    tiles = _to_tiles(shape, work, q)
    highest = np.full((*tiles.shape[:-1], 1), np.finfo(np.float32).min, np.float32)
    total = np.zeros_like(highest)
    weighted = np.zeros_like(tiles)
    for chunk in work.chunks:
        part = np.s_[:, chunk.tiles]
        gathered = (shape.kv_heads, len(chunk.pages), shape.chunk, shape.head_dim)
        k = np.take(keys, chunk.pages, axis=1).reshape(gathered)
        v = np.take(values, chunk.pages, axis=1).reshape(gathered)
        scores = np.matmul(tiles[part], k.swapaxes(-1, -2))
        if chunk.hidden is not None:
            np.copyto(scores, np.float32(-np.inf), where=chunk.hidden)
        before = highest[part]
        now = np.maximum(before, scores.max(axis=-1, keepdims=True))
        scores -= now
        np.exp(scores, out=scores)
        shrink = np.exp(before - now)
        total[part] = total[part] * shrink + scores.sum(axis=-1, keepdims=True)
        weighted[part] = weighted[part] * shrink + np.matmul(scores, v)
        highest[part] = now
    weighted /= total
    _from_tiles(shape, work, weighted, out)


def _to_tiles(shape: TileShape, work: Work, q: Float32) -> Float32:
    """Scaled queries as [kv_heads, tiles, rows, head_dim], zeros where a tile is not full."""
    heads = shape.kv_heads * shape.group
    places = np.zeros((work.num_tiles * shape.tokens, heads * shape.head_dim), np.float32)
    places[work.spread] = q[work.rows] * np.float32(shape.head_dim**-0.5)
    tiles = np.zeros((shape.kv_heads, work.num_tiles, shape.rows, shape.head_dim), np.float32)
    by_token = places.reshape(work.num_tiles, shape.tokens, shape.kv_heads, shape.group, shape.head_dim)
    _used(shape, tiles)[...] = by_token.transpose(2, 0, 1, 3, 4)
    return tiles


def _from_tiles(shape: TileShape, work: Work, tiles: Float32, out: Float32) -> None:
    by_token = _used(shape, tiles).transpose(1, 2, 0, 3, 4)
    out[work.rows] = by_token.reshape(work.num_tiles * shape.tokens, -1)[work.spread]


def _used(shape: TileShape, tiles: Float32) -> Float32:
    """View of the rows of tiles that hold queries, [kv_heads, tiles, tokens, group, head_dim]."""
    used = tiles[:, :, : shape.tokens * shape.group]
    return used.reshape(*tiles.shape[:2], shape.tokens, shape.group, shape.head_dim)  # splits an axis: never a copy
