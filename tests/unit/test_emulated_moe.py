"""Experts chosen, tokens sorted by expert and brought back together, emulated: against float64 and a sort by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulated_kernel import EmulatedKernel, EmulatedLoader, aligned, normal, pointer
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.kernels.moe import EXPERTS_PER_TOKEN, TILE_ROWS, Moe, MoeShape, sources

HIDDEN = 24
SHARE_ERROR = 2e-5  # absolute: fp32 sums of exact products


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EmulatedKernel]:
    folder = tmp_path_factory.mktemp("kernels")
    return {source.name: EmulatedKernel(source, folder) for source in sources()}


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(), num_experts=st.integers(1, 64), vectors=st.integers(1, 40), count=st.integers(0, 90),
    start=st.integers(0, 20), length=st.integers(1, 70), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_route(
    kernels: dict[str, EmulatedKernel],
    data: st.DataObject,
    num_experts: int,
    vectors: int,
    count: int,
    start: int,
    length: int,
    seed: int,
) -> None:
    """One token in twenty is not a number: it gets experts, and no shares."""
    k = data.draw(st.sampled_from([k for k in EXPERTS_PER_TOKEN if k <= num_experts]), label="experts_per_token")
    rng, stop = np.random.default_rng(seed), start + length
    done = slice(start, max(start, min(stop, count)))
    normed, weight = normal(rng, max(stop, count), 8 * vectors), normal(rng, num_experts, 8 * vectors)
    lost = rng.random(len(normed)) < 0.05
    normed[lost, 0] = np.nan
    experts, shares = aligned(np.full((stop, k), -7, np.int32)), aligned(np.full((stop, k), -7, np.float32))
    num_tokens = np.full(1, count, np.int32)
    loader: Any = EmulatedLoader(kernels, readable=(normed,), seed=seed)
    Moe(loader, MoeShape(8 * vectors, num_experts, k)).route(
        normed=pointer(normed), weight=pointer(weight), experts=pointer(experts), shares=pointer(shares),
        num_tokens=pointer(num_tokens), start=start, stop=stop, stream=0,
    )  # fmt: skip
    assert (np.delete(experts, done, axis=0) == -7).all()
    assert (np.delete(shares, done, axis=0) == -7).all()
    experts, shares, lost = experts[done], shares[done], lost[done]
    assert all(len(set(row)) == k and min(row) >= 0 and max(row) < num_experts for row in experts.tolist())
    assert np.isnan(shares[lost]).all()
    logits = normed[done].astype(np.float64) @ weight.astype(np.float64).T
    wanted = np.exp(logits - logits.max(-1, keepdims=True))
    wanted /= wanted.sum(-1, keepdims=True)
    kept = np.take_along_axis(wanted, experts, axis=1)
    best = -np.sort(-wanted, axis=1)[:, :k]
    assert np.allclose(kept[~lost], best[~lost], rtol=0, atol=SHARE_ERROR)  # others only where they tie in float32
    assert np.allclose(shares[~lost], (kept / kept.sum(-1, keepdims=True))[~lost], rtol=0, atol=SHARE_ERROR)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), count=st.integers(0, 300), start=st.integers(0, 40), length=st.integers(1, 300))
def test_permute(kernels: dict[str, EmulatedKernel], data: st.DataObject, count: int, start: int, length: int) -> None:
    """``count`` tokens are there, and the range begins at ``start``."""
    num_experts = data.draw(st.integers(1, 64), label="num_experts")
    k = data.draw(st.sampled_from([k for k in EXPERTS_PER_TOKEN if k <= num_experts]), label="experts_per_token")
    sms, seed = data.draw(st.sampled_from([1, 3, 132]), label="sms"), data.draw(st.integers(0, 1 << 20), label="seed")
    shape, rng, stop = MoeShape(HIDDEN, num_experts, k), np.random.default_rng(seed), start + length
    capacity = max(count, stop)
    liking = rng.random((capacity, num_experts)) ** data.draw(st.sampled_from([1, 30]), label="skew")
    experts = aligned(np.argsort(liking * np.arange(num_experts), axis=1)[:, :k].astype(np.int32))
    normed = aligned(rng.integers(0, 1 << 16, (capacity, HIDDEN), dtype=np.uint16))
    tiles = shape.max_tiles(length)
    permuted = aligned(np.full((tiles * TILE_ROWS, HIDDEN), 0xFFFF, np.uint16))
    places, tile_experts = aligned(np.full((capacity, k), -7, np.int32)), aligned(np.full(tiles, -7, np.int32))
    num_rows, num_tokens = np.full(1, -7, np.int32), np.full(1, count, np.int32)
    loader: Any = EmulatedLoader(kernels, readable=(normed,), seed=seed)
    Moe(loader, shape).permute(
        normed=pointer(normed), experts=pointer(experts), permuted=pointer(permuted), places=pointer(places),
        tile_experts=pointer(tile_experts), num_rows=pointer(num_rows), num_tokens=pointer(num_tokens),
        start=start, stop=stop, sms=sms, stream=0,
    )  # fmt: skip

    tokens = range(start, max(start, min(stop, count)))
    expected_places = np.full((capacity, k), -7)
    expected, of_tiles = np.zeros((tiles * TILE_ROWS, HIDDEN), np.uint16), []
    for expert in range(num_experts):
        row = TILE_ROWS * len(of_tiles)
        choices = [
            (token, int(np.flatnonzero(experts[token] == expert)[0])) for token in tokens if expert in experts[token]
        ]
        for i, (token, choice) in enumerate(choices):
            expected_places[token, choice] = row + i
            expected[row + i] = normed[token]
        of_tiles += [expert] * -(-len(choices) // TILE_ROWS)
    rows = TILE_ROWS * len(of_tiles)
    assert num_rows[0] == rows
    assert tile_experts.tolist() == [*of_tiles, *[-7] * (tiles - len(of_tiles))]
    assert (places == expected_places).all()
    assert (permuted[:rows] == expected[:rows]).all()
    assert (permuted[rows:] == 0xFFFF).all()


@settings(deadline=None, max_examples=50)
@given(
    k=st.sampled_from(EXPERTS_PER_TOKEN), vectors=st.integers(1, 9) | st.integers(100, 300), count=st.integers(0, 60),
    start=st.integers(0, 20), length=st.integers(1, 60), sms=st.sampled_from([1, 132]), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_combine(
    kernels: dict[str, EmulatedKernel], k: int, vectors: int, count: int, start: int, length: int, sms: int, seed: int
) -> None:
    rng, stop = np.random.default_rng(seed), start + length
    hidden, down = normal(rng, stop, 8 * vectors), normal(rng, k * stop, 8 * vectors)
    places = aligned(rng.permutation(k * stop).reshape(stop, k).astype(np.int32))
    shares, num_tokens = aligned(rng.random((stop, k), np.float32)), np.full(1, count, np.int32)
    before = hidden.copy()
    loader: Any = EmulatedLoader(kernels, readable=(hidden, down), seed=seed)
    Moe(loader, MoeShape(8 * vectors, max(EXPERTS_PER_TOKEN), k)).combine(
        hidden=pointer(hidden), down=pointer(down), places=pointer(places), shares=pointer(shares),
        num_tokens=pointer(num_tokens), start=start, stop=stop, sms=sms, stream=0,
    )  # fmt: skip
    done = slice(start, max(start, min(stop, count)))
    parts = np.einsum("tk,tkh->th", shares[done].astype(np.float64), down[places[done]].astype(np.float64))
    expected = before[done].astype(np.float64) + parts
    assert np.allclose(hidden[done].astype(np.float64), expected, rtol=2**-8, atol=1e-5)
    assert (np.delete(hidden, done, axis=0) == np.delete(before, done, axis=0)).all()
