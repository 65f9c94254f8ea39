"""Rotary embedding and KV append against float64, through page tables, on a poisoned cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from paged_cache import unswizzled

from nf.config import RopeConfig
from nf.executors.rope import rotary_table
from nf.kernels.load import KernelLoader
from nf.kernels.registry import artifacts
from nf.kernels.rope_append import KvRows, RopeAppend, RopeShape, rotary_pairs, sources

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

ROUNDING = 2**-8  # of bf16, and as much again for the arithmetic before it
POSITIONS = 300
POISON = 12345.0
ROPES = {
    "default": RopeConfig(),
    "linear": RopeConfig(kind="linear", factor=4.0),
    "llama3": RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
}


@dataclass
class Case:
    """Sequences that append ``news`` tokens after ``olds`` ones."""

    shape: RopeShape
    olds: list[int]
    news: list[int]
    rope: str = "default"

    def __post_init__(self) -> None:
        rng = np.random.default_rng(len(self.olds))
        shape, page_size = self.shape, self.shape.page_size
        lens = np.add(self.olds, self.news).astype(int)
        pages = -(-lens // page_size)
        self.num_pages = int(pages.sum()) + 2
        indices = rng.permutation(self.num_pages)[: pages.sum()]
        starts = np.concatenate([[0], np.cumsum(pages)]).astype(int)
        positions = [p for old, new in zip(self.olds, self.news, strict=True) for p in range(old, old + new)]
        sequence = np.repeat(np.arange(len(self.olds)), np.array(self.news, int))
        self.tokens = len(positions)
        self.expected_rows = [
            int(indices[starts[s] + p // page_size]) * page_size + p % page_size
            for s, p in zip(sequence, positions, strict=True)
        ]
        self.num_tokens, self.num_seqs = int32([self.tokens]), int32([len(self.olds)])
        self.positions = int32(positions)
        self.qo_indptr = int32(np.concatenate([[0], np.cumsum(self.news)]))
        self.kv_indptr, self.kv_indices = int32(starts), int32(indices)
        self.cosines, self.sines = rotary_table(ROPES[self.rope], shape.head_dim, POSITIONS)
        self.table = torch.from_numpy(rotary_pairs(self.cosines, self.sines)).cuda()
        self.qkv = torch.randn(self.tokens + 1, shape.qkv_size, device="cuda").bfloat16()
        self.norms = [torch.randn(shape.head_dim, device="cuda").bfloat16() for _ in range(2)]
        halves = shape.head_dim // 64
        self.cache = torch.full(
            (self.num_pages, shape.num_kv_heads, 2, halves, page_size, 64), POISON, device="cuda"
        ).bfloat16()

    def rows(self) -> Any:
        rows = torch.full((self.tokens + 5,), -7, device="cuda", dtype=torch.int32)
        KvRows(KernelLoader(artifacts(sources(), "sm_90a")), self.shape.page_size).launch(
            rows=rows.data_ptr(), positions=self.positions.data_ptr(), qo_indptr=self.qo_indptr.data_ptr(),
            kv_indptr=self.kv_indptr.data_ptr(), kv_indices=self.kv_indices.data_ptr(),
            num_tokens=self.num_tokens.data_ptr(), num_seqs=self.num_seqs.data_ptr(),
            max_tokens=self.tokens + 5, stream=stream(),
        )  # fmt: skip
        return rows

    def run(self, rows: Any, start: int, stop: int, *, q: Any = None, sms: int = 132) -> None:
        RopeAppend(KernelLoader(artifacts(sources(), "sm_90a")), self.shape).launch(
            qkv=self.qkv.data_ptr(), kv=self.cache.data_ptr(), table=self.table.data_ptr(), rows=rows.data_ptr(),
            positions=self.positions.data_ptr(), count=self.num_tokens.data_ptr(), start=start, stop=stop,
            sms=sms, stream=stream(), q=0 if q is None else q.data_ptr(), q_stride=0 if q is None else q.shape[1],
            q_norm=self.norms[0].data_ptr(), k_norm=self.norms[1].data_ptr(),
        )  # fmt: skip

    def expected(self, qkv: Any) -> tuple[Any, Any, Any]:
        """q, k, v as [tokens, heads, head_dim], float64."""
        shape = self.shape
        heads = qkv[: self.tokens].double().view(self.tokens, shape.qkv_size // shape.head_dim, shape.head_dim)
        q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if shape.qk_norm:
            q, k = (
                x / (x.square().mean(-1, keepdim=True) + shape.eps).sqrt() * weight.double()
                for x, weight in zip((q, k), self.norms, strict=True)
            )
        at = self.positions.cpu().numpy()
        cosines, sines = (torch.from_numpy(t[at]).cuda().double()[:, None] for t in (self.cosines, self.sines))

        def rotate(x: Any) -> Any:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)

        return rotate(q), rotate(k), v

    def appended(self) -> tuple[Any, Any]:
        """k and v of the tokens, read back from the cache: [tokens, kv_heads, head_dim]."""
        plain = unswizzled(self.cache)
        at = torch.tensor(self.expected_rows, device="cuda", dtype=torch.long)
        rows = plain[at // self.shape.page_size, :, :, at % self.shape.page_size]
        return rows[:, :, 0], rows[:, :, 1]


def int32(values: Any) -> Any:
    return torch.tensor(np.asarray(values), device="cuda", dtype=torch.int32)


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def close(found: Any, reference: Any, scale: Any) -> bool:
    """Within the rounding of the result, or of the two products whose difference it is."""
    return bool(((found.double() - reference).abs() <= ROUNDING * reference.abs() + 1e-6 * scale).all())


def check(case: Case, start: int = 0, stop: int = 1 << 20, *, own_q: bool = False, sms: int = 132) -> None:
    rows, before = case.rows(), case.qkv.clone()
    assert rows[: case.tokens].tolist() == case.expected_rows
    assert (rows[case.tokens :] == -7).all()
    q_size = case.shape.num_heads * case.shape.head_dim
    own = torch.full((case.tokens + 1, q_size + 8), POISON, device="cuda").bfloat16() if own_q else None
    stop = min(stop, case.tokens + 1)
    case.run(rows, start, stop, q=own, sms=sms)
    q, k, v = case.expected(before)
    done = slice(start, min(stop, case.tokens))
    found = own[:, :q_size] if own is not None else case.qkv[:, :q_size]
    assert close(found[done].view(q[done].shape), q[done], 8.0)
    found_k, found_v = case.appended()
    assert close(found_k[done], k[done], 8.0)
    assert torch.equal(found_v[done].double(), v[done])
    # Nothing else was written.
    mask = torch.ones(case.tokens + 1, dtype=torch.bool, device="cuda")
    mask[done] = False
    rest = (own if own is not None else case.qkv)[mask]
    assert torch.equal(rest, torch.full_like(rest, POISON) if own is not None else before[mask])
    assert torch.equal(case.qkv[:, q_size:], before[:, q_size:])
    written = (case.cache != POISON).sum().item()
    assert written == (done.stop - done.start) * 2 * case.shape.num_kv_heads * case.shape.head_dim


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_configurations(head_dim: int, page_size: int, qk_norm: bool) -> None:
    check(Case(RopeShape(8, 2, head_dim, page_size, qk_norm, 1e-6), [0, 5, 63, 200], [70, 1, 3, 1]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (5, 1), (8, 1), (32, 8), (64, 8), (14, 2), (40, 8)])
def test_heads(heads: int, kv_heads: int) -> None:
    check(Case(RopeShape(heads, kv_heads, 128, 16), [0, 17, 4], [9, 20, 1]))
    check(Case(RopeShape(heads, kv_heads, 64, 16, True, 1e-6), [0, 17, 4], [9, 20, 1]), own_q=True)


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies(rope: str) -> None:
    check(Case(RopeShape(4, 2, 128, 16), [0], [POSITIONS], rope))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 60), (50, 1000), (81, 82)])
def test_ranges(start: int, stop: int) -> None:
    check(Case(RopeShape(8, 2, 128, 16), [10] * 40 + [0], [1] * 40 + [41]), start, stop, sms=3)


def test_no_tokens() -> None:
    check(Case(RopeShape(8, 2, 128, 16), [], []))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_values_that_are_not_finite_stay_with_their_token(head_dim: int) -> None:
    case = Case(RopeShape(4, 2, head_dim, 16), [0], [20])
    values = case.qkv.view(21, -1, head_dim)[:, -2:]  # two V heads
    values[3, 1, 7] = float("nan")
    values[5, 0, head_dim - 1] = float("-inf")
    before = case.qkv.clone()
    case.run(case.rows(), 0, 20)
    _, k, v = case.expected(before)
    found_k, found_v = case.appended()
    for token, head in ((3, 1), (5, 0)):
        assert found_k[token, head].isnan().all()
        k[token, head] = 0.0
        found_k[token, head] = 0.0
    assert close(found_k, k, 8.0)
    assert torch.equal(found_v.double(), v.nan_to_num(0.0, 0.0, 0.0))
