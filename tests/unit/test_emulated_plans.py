"""How attention is cut up on the device, by the planning kernels emulated: against the line of tiles written out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from emulated_kernel import EmulatedKernel, EmulatedLoader, int32, pointer
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.kernels.decode_attention import (
    ENTRY_BYTES,
    MIN_SPAN_BYTES,
    DecodeAttention,
    DecodeShape,
    plan_source,
    ring_on,
)
from nf.kernels.prefill_attention import PrefillAttention, sources

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, SMS = 8, 2, 128, 16, 132
FEW_PARTS = 8  # of a group, that one warp merges
LENGTHS = st.lists(st.integers(1, 40) | st.integers(1, 3000), max_size=40)
SEEDS = st.integers(0, 1 << 20)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EmulatedKernel]:
    folder = tmp_path_factory.mktemp("kernels")
    prefill = next(source for source in sources() if source.name == "prefill_plan")
    return {source.name: EmulatedKernel(source, folder) for source in (plan_source(), prefill)}


def indptr(counts: Iterable[int]) -> list[int]:
    return list(accumulate(counts, initial=0))


@settings(deadline=None, max_examples=60)
@given(
    kv_lens=LENGTHS | st.lists(st.integers(1, 200), min_size=1020, max_size=1100),
    first=st.integers(0, 12),
    others=st.integers(0, 3),
    window=st.none() | st.integers(1, 2000),
    sms=st.sampled_from([1, 2, 16, 24, 66, SMS]),
    seed=SEEDS,
)
def test_decode_plan(
    kernels: dict[str, EmulatedKernel],
    kv_lens: list[int],
    first: int,
    others: int,
    window: int | None,
    sms: int,
    seed: int,
) -> None:
    """``others`` are prefill rows that follow."""
    loader: Any = EmulatedLoader(kernels, readable=(), seed=seed)
    shape = DecodeShape(HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, window=window)
    attention = DecodeAttention(loader, shape, sms=SMS)
    pages = indptr(-(-length // PAGE_SIZE) for length in [*kv_lens, *[64] * others])
    workspace = int32(np.full(shape.workspace_bytes(SMS) // 4, -1))
    arrays = int32([*kv_lens, *[64] * others]), int32(pages), int32([len(kv_lens)])
    attention.plan(
        kv_lens=pointer(arrays[0]), kv_indptr=pointer(arrays[1]), num_decode=pointer(arrays[2]),
        workspace=pointer(workspace), start=first, stop=len(kv_lens) + others, sms=sms, stream=0,
    )  # fmt: skip
    most = attention.max_spans
    merge_count, records = int(workspace[0]), workspace[8:].reshape(-1, 8)
    spans, merges = records[:most], records[most : most + merge_count]
    tile_keys = ring_on(sms).tile_keys(HEAD_DIM)

    def tiles_of(length: int) -> range:
        begin = max(0, length - window) if window else 0
        return range(begin // tile_keys, -(-length // tile_keys))

    rows = range(first, len(kv_lens))
    line = [(row, head, tile) for row in rows for head in range(KV_HEADS) for tile in tiles_of(kv_lens[row])]
    ring = ring_on(sms)
    count = min(ring.warps * sms, max(1, len(line) * ring.stage_bytes // MIN_SPAN_BYTES)) if line else 0
    assert not spans[count:].any()
    lengths = spans[:count, 3]
    assert lengths.sum() == len(line)
    # A span begins at the first tile whose group is not entered yet, or that is not taken yet, when its share begins.
    entry = ENTRY_BYTES // ring.stage_bytes
    priced = [
        place
        for place, (row, _, tile) in enumerate(line)
        for _ in range(1 + entry * (tile == tiles_of(kv_lens[row])[0]))
    ]
    begins = [int(share[0]) for share in np.array_split(priced, count)] if line else []
    assert lengths.all()
    assert lengths.tolist() == np.diff([*begins, len(line)]).tolist()
    parts = defaultdict(list)
    for i, (begin, end) in enumerate(pairwise(indptr(lengths.tolist()))):
        row, head, tile, _, kv_len, page_begin = spans[i, :6].tolist()
        assert (row, head, tile) == line[begin]
        assert (kv_len, page_begin) == (kv_lens[row], pages[row])
        for group in dict.fromkeys((row, head) for row, head, _ in line[begin:end]):
            parts[group].append(i)
    expected = [
        (*group, own[0], own[-1], column)
        for group, own in parts.items()
        if len(own) > 1
        for column in ([-1] if len(own) <= FEW_PARTS else range(HEAD_DIM // 16))
    ]
    assert sorted(map(tuple, merges[:, :5].tolist())) == sorted(expected)


@settings(deadline=None, max_examples=60)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 20) | st.integers(1, 700), st.integers(0, 900)), max_size=70),
    decodes=st.integers(0, 5),
    bounds=st.tuples(st.integers(0, 500), st.integers(0, 3000)),
    seed=SEEDS,
)
def test_prefill_plan(
    kernels: dict[str, EmulatedKernel],
    sequences: list[tuple[int, int]],
    decodes: int,
    bounds: tuple[int, int],
    seed: int,
) -> None:
    """``sequences`` of (new tokens, cached ones); after ``decodes`` with one row each."""
    start, stop = bounds[0], bounds[0] + bounds[1]
    loader: Any = EmulatedLoader(kernels, readable=(), seed=seed)
    attention = PrefillAttention(loader, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE_SIZE)
    new = [1] * decodes + [tokens for tokens, _ in sequences]
    kv_lens = [5] * decodes + [tokens + cached for tokens, cached in sequences]
    begins, pages = indptr(new), indptr(-(-length // PAGE_SIZE) for length in kv_lens)
    plan = int32(np.full(attention.plan_bytes(stop - start, len(new) + 1) // 4, -1))
    arrays = int32(begins), int32(kv_lens or [0]), int32(pages), int32([decodes]), int32([len(new)])
    attention.plan(*map(pointer, arrays), pointer(plan), start=start, stop=stop, stream=0)

    def section(i: int) -> list[list[int]]:
        """Tiles of a sequence, the later rows first, and last its number of keys."""
        begin, end = max(begins[i], start), min(begins[i + 1], stop)
        cuts = range(begin, end, attention.tile_tokens)
        position = kv_lens[i] - begins[i + 1]  # of row 0, as if it were the sequence's
        return [[row, min(attention.tile_tokens, end - row), position + row, pages[i]] for row in reversed(cuts)]

    def keys(i: int) -> int:
        return kv_lens[i] - begins[i + 1] + min(begins[i + 1], stop)

    order = sorted(range(decodes, len(new)), key=lambda i: (-keys(i), i))
    expected: list[list[int]] = []
    for tiles in map(section, order):
        expected += [[*tile, len(expected), len(tiles)] for tile in tiles]
    assert plan[:2].tolist() == [len(expected), 0]
    assert plan[8 : 8 + 8 * len(expected)].reshape(-1, 8)[:, :6].tolist() == expected
