"""Rotation and append with the map from tokens to rows of the cache, emulated: against float64, through page tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from emulated_kernel import EmulatedKernel, EmulatedLoader, aligned, int32, normal, pointer
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from paged_cache import unswizzled

from nf.config import RopeConfig
from nf.executors.rope import rotary_table
from nf.kernels import rows
from nf.kernels.rope_append import KvRows, RopeAppend, RopeShape, rope_source, rotary_pairs, rows_source

CASES = [(64, 16, True), (128, 32, False)]  # head_dim, page_size, norms of q and k
POSITIONS, EPS = 200, 1e-6
ROUNDING = 2**-8  # of bf16, and as much again for the arithmetic before it
SEQUENCES = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 4) | st.integers(1, 50)), max_size=8)
"""Tokens of each that are in the cache, and new ones."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EmulatedKernel]]:
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "device_sms", lambda: 132)
        sources = [source for case in CASES for source in (rope_source(*case), rows_source(case[1]))]
        yield {source.name: EmulatedKernel(source, folder) for source in sources}


def normed(heads: Any, weight: Any) -> Any:
    return heads / np.sqrt((heads**2).mean(-1, keepdims=True) + EPS) * weight.astype(np.float64)


def close(found: Any, reference: Any) -> bool:
    """Within the rounding of the result, or of the two products whose difference it is."""
    return bool((np.abs(found.astype(np.float64) - reference) <= ROUNDING * np.abs(reference) + 1e-5).all())


class Step:
    """Sequences that append new tokens after those in the cache; one value in a hundred tokens is infinite."""

    def __init__(self, sequences: list[tuple[int, int]], shape: RopeShape, seed: int) -> None:
        self.sequences, self.shape = sequences, shape
        rng, page_size = np.random.default_rng(seed), shape.page_size
        self.tokens = sum(new for _, new in sequences)
        pages = [-(-(old + new) // page_size) for old, new in sequences]
        starts = list(accumulate(pages, initial=0))
        self.indices = int32(rng.permutation(sum(pages) + 2)[: sum(pages)])
        of_token = [(i, old + j) for i, (old, new) in enumerate(sequences) for j in range(new)]
        self.places = [int(self.indices[starts[i] + p // page_size]) * page_size + p % page_size for i, p in of_token]
        self.positions, self.kv_indptr = int32([position for _, position in of_token]), int32(starts)
        self.qo_indptr = int32([0, *accumulate(new for _, new in sequences)])
        self.count, self.rows = int32([self.tokens]), int32(np.full(self.tokens + 3, -7))
        self.qkv = normal(rng, self.tokens + 1, shape.qkv_size)
        values = self.qkv.reshape(self.tokens + 1, -1, shape.head_dim)[:, -shape.num_kv_heads :]
        values[rng.random(values.shape) < 0.01 / values[0].size] = np.inf
        self.norms = [normal(rng, shape.head_dim) for _ in range(2)]
        self.cosines, self.sines = rotary_table(RopeConfig(), shape.head_dim, POSITIONS)
        cache = (sum(pages) + 2, shape.num_kv_heads, 2, shape.head_dim // 64, page_size, 64)
        self.cache = aligned(np.full(cache, 12345.0, bfloat16))

    def find_rows(self, kernels: dict[str, EmulatedKernel], seed: int) -> None:
        num_seqs = int32([len(self.sequences)])
        loader: Any = EmulatedLoader(kernels, readable=(), seed=seed)
        KvRows(loader, self.shape.page_size).launch(
            rows=pointer(self.rows), positions=pointer(self.positions), qo_indptr=pointer(self.qo_indptr),
            kv_indptr=pointer(self.kv_indptr), kv_indices=pointer(self.indices), num_tokens=pointer(self.count),
            num_seqs=pointer(num_seqs), max_tokens=len(self.rows), stream=0,
        )  # fmt: skip

    def append(self, kernels: dict[str, EmulatedKernel], start: int, stop: int, sms: int, seed: int) -> None:
        table = aligned(rotary_pairs(self.cosines, self.sines))
        loader: Any = EmulatedLoader(kernels, readable=(self.qkv,), constant=(table,), seed=seed)
        RopeAppend(loader, self.shape).launch(
            qkv=pointer(self.qkv), kv=pointer(self.cache), table=pointer(table), rows=pointer(self.rows),
            positions=pointer(self.positions), count=pointer(self.count), start=start, stop=stop, sms=sms, stream=0,
            q_norm=pointer(self.norms[0]), k_norm=pointer(self.norms[1]),
        )  # fmt: skip

    def expected(self, done: slice) -> tuple[Any, Any, Any]:
        """Rotated queries and keys, and values, of some tokens: [tokens, heads, head_dim] float64."""
        shape = self.shape
        heads = self.qkv[done].astype(np.float64).reshape(-1, shape.qkv_size // shape.head_dim, shape.head_dim)
        q, k, v = np.split(heads, [shape.num_heads, shape.num_heads + shape.num_kv_heads], axis=1)
        if shape.qk_norm:
            q, k = normed(q, self.norms[0]), normed(k, self.norms[1])
        cosine, sine = (part[self.positions[done]].astype(np.float64)[:, None] for part in (self.cosines, self.sines))

        def rotated(x: Any) -> Any:
            first, second = np.split(x, 2, axis=-1)
            return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)

        return rotated(q), rotated(k), v


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(deadline=None, max_examples=60)
@given(
    sequences=SEQUENCES,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    span=st.tuples(st.integers(0, 60), st.integers(1, 300)),
    sms=st.sampled_from([1, 3, 132]),
    seed=st.integers(0, 1 << 20),
)
def test_rotated_and_appended(
    kernels: dict[str, EmulatedKernel],
    case: tuple[int, int, bool],
    sequences: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    span: tuple[int, int],
    sms: int,
    seed: int,
) -> None:
    head_dim, page_size, qk_norm = case
    shape = RopeShape(kv_heads * group, kv_heads, head_dim, page_size, qk_norm, EPS)
    step = Step(sequences, shape, seed)
    step.find_rows(kernels, seed)
    assert step.rows.tolist() == [*step.places, -7, -7, -7]

    start, stop = span[0], sum(span)
    done = slice(start, max(start, min(stop, step.tokens)))
    q, k, v = step.expected(done)
    qkv, cache, q_size = step.qkv.copy(), unswizzled(step.cache), shape.num_heads * head_dim
    step.append(kernels, start, stop, sms, seed)
    assert close(step.qkv[done, :q_size].reshape(q.shape), q)

    page, offset = np.divmod(np.array(step.places[done], int), page_size)
    found = unswizzled(step.cache)
    found_k, found_v = (found[page, :, i, offset].astype(np.float64) for i in range(2))
    broken = ~np.isfinite(v).all(-1, keepdims=True)
    assert np.isnan(found_k[np.broadcast_to(broken, k.shape)]).all()
    assert close(np.where(broken, 0, found_k), np.where(broken, 0, k))
    assert (found_v == np.where(np.isfinite(v), v, 0)).all()

    found[page, :, :, offset] = cache[page, :, :, offset]
    step.qkv[done, :q_size] = qkv[done, :q_size]
    assert (found == cache).all()
    assert (step.qkv == qkv).all()
