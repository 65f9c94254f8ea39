"""Decode attention with its plan and its merging, emulated: warps that walk spans of any rows, against float64.

The arithmetic of a tile is the GPU tests' business; what matters here is that every tile is taken once, with its own
pages, queries and keys, whatever the lengths and whoever is first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_kernel import Copies, EmulatedKernel, EmulatedLoader, aligned, int32, normal, pointer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from paged_cache import swizzled

from nf.kernels.decode_attention import (
    DecodeAttention,
    DecodeShape,
    attention_source,
    merge_source,
    plan_source,
    ring_on,
)

SMS = 132
CASES = [(64, 16, 1), (128, 32, 1), (64, 16, 3), (64, 64, 66), (64, 16, 66), (128, 64, 1)]
"""(head_dim, page_size, SMs): a tile has two pages, half of one, two, one, four, a quarter of one."""
RELATIVE_ERROR = 5e-3  # of a row's norm: weights and outputs are rounded to bf16 (2^-9)
OTHERS = 1 << 30  # length of a row that does not decode


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EmulatedKernel]:
    folder = tmp_path_factory.mktemp("kernels")
    attention = {attention_source(dim, page, ring_on(sms)) for dim, page, sms in CASES}
    return {source.name: EmulatedKernel(source, folder) for source in (plan_source(), merge_source(), *attention)}


@dataclass
class Rows:
    """Rows that decode, and one more; whatever the kernels must not use is NaN or leads outside."""

    kv_lens: list[int]
    shape: DecodeShape
    seed: int

    def __post_init__(self) -> None:
        shape, rng = self.shape, np.random.default_rng(self.seed)
        pages = [-(-length // shape.page_size) for length in self.kv_lens]
        self.indptr = int32(list(accumulate(pages, initial=0)))
        self.indices = int32(rng.permutation(sum(pages) + 2)[: max(1, sum(pages))])
        self.lens = int32([*self.kv_lens, OTHERS])
        self.q = normal(rng, len(self.lens), (shape.num_heads + 2) * shape.head_dim)
        cache = np.full((sum(pages) + 2, shape.num_kv_heads, 2, shape.page_size, shape.head_dim), np.nan, bfloat16)
        self.dense = []
        for i, length in enumerate(self.kv_lens):
            kv = normal(rng, shape.num_kv_heads, 2, length, shape.head_dim)
            self.dense.append(kv)
            padded = np.full((*kv.shape[:2], pages[i] * shape.page_size, shape.head_dim), np.nan, bfloat16)
            padded[:, :, :length] = kv
            own = self.indices[self.indptr[i] : self.indptr[i + 1]]
            cache[own] = padded.reshape(*kv.shape[:2], pages[i], shape.page_size, -1).transpose(2, 0, 1, 3, 4)
        self.cache = aligned(swizzled(cache))

    def attend(self, kernels: dict[str, EmulatedKernel], sms: int, launches: int, copies: Copies, planned: int) -> Any:
        """Outputs of the last of several launches after one plan, which is for ``planned`` SMs."""
        shape = self.shape
        workspace = aligned(np.full(shape.workspace_bytes(SMS), 0xAB, np.uint8))
        readable = (self.q, self.cache, self.lens, self.indptr, self.indices, workspace)
        loader: Any = EmulatedLoader(kernels, readable=readable, seed=self.seed, copies=copies)
        attention, count = DecodeAttention(loader, shape, sms=SMS), int32([len(self.kv_lens)])
        table: dict[str, Any] = {"kv_lens": pointer(self.lens), "kv_indptr": pointer(self.indptr)}
        on: dict[str, Any] = {"workspace": pointer(workspace), "stream": 0}
        attention.plan(**table, num_decode=pointer(count), start=0, stop=len(self.lens), sms=planned, **on)
        for _ in range(launches):
            out = aligned(np.full((len(self.lens), shape.num_heads * shape.head_dim), np.nan, bfloat16))
            attention.launch(
                q=pointer(self.q), q_stride=self.q.shape[1], kv=pointer(self.cache), out=pointer(out), **table,
                kv_indices=pointer(self.indices), sms=sms, **on,
            )  # fmt: skip
        return out.astype(np.float64)

    def expected(self, row: int) -> Any:
        shape = self.shape
        q = self.q[row, : shape.num_heads * shape.head_dim].reshape(shape.num_kv_heads, shape.group, -1)
        kv = self.dense[row][:, :, -(shape.window or 0) :].astype(np.float64)
        scores = np.einsum("ngd,nkd->ngk", q.astype(np.float64), kv[:, 0]) * shape.head_dim**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("ngk,nkd->ngd", weights / weights.sum(-1, keepdims=True), kv[:, 1]).ravel()


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(deadline=None, max_examples=25)
@given(
    kv_lens=st.lists(st.integers(1, 40) | st.integers(1, 700), max_size=24),
    group=st.integers(1, 8),
    num_kv_heads=st.integers(1, 3),
    window=st.none() | st.integers(1, 300),
    seed=st.integers(0, 1 << 20),
    copies=st.sampled_from(Copies),
    planned=st.sampled_from([1, 2, 3]),
)
@example(
    kv_lens=[2800] * 9, group=4, num_kv_heads=2, window=None, seed=0, copies=Copies.BY_CHANCE, planned=3
)  # three spans a warp
@example(kv_lens=[5000, *[1] * 40], group=8, num_kv_heads=2, window=None, seed=1, copies=Copies.LATE, planned=1)
def test_every_key_counts_once(
    kernels: dict[str, EmulatedKernel],
    case: tuple[int, int, int],
    kv_lens: list[int],
    group: int,
    num_kv_heads: int,
    window: int | None,
    seed: int,
    copies: Copies,
    planned: int,
) -> None:
    """Planned for as many SMs as there are, or a few times as many."""
    head_dim, page_size, sms = case
    rows = Rows(kv_lens, DecodeShape(num_kv_heads * group, num_kv_heads, head_dim, page_size, window=window), seed)
    out = rows.attend(kernels, sms, launches=2, copies=copies, planned=min(SMS, sms * planned))
    for row in range(len(kv_lens)):
        expected = rows.expected(row)
        assert np.linalg.norm(out[row] - expected) < RELATIVE_ERROR * np.linalg.norm(expected), (row, kv_lens[row])
    assert np.isnan(out[len(kv_lens)]).all()


@pytest.mark.parametrize("order", ["async_proxy_fence();", "to = known_after_tile(scores, values, to, zero);"])
def test_a_copy_that_may_overtake_reads_is_found(
    kernels: dict[str, EmulatedKernel], tmp_path: Path, order: str
) -> None:
    source = attention_source(64, 16, ring_on(1))
    disordered = kernels | {source.name: EmulatedKernel(source, tmp_path, without=order)}
    with pytest.raises(AssertionError, match="may overtake a read"):
        Rows([2800], DecodeShape(4, 1, 64, 16), seed=0).attend(
            disordered, 1, launches=1, copies=Copies.BY_CHANCE, planned=1
        )
