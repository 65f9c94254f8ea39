"""Norms, the embedding and copies, emulated: any range of rows, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulated_kernel import EmulatedKernel, EmulatedLoader, aligned, int32, normal, pointer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from nf.kernels import copies, gather, norm, rows

EPS = 1e-5
ROUNDING = 2**-8  # of bf16, and as much again for the arithmetic before it
SEEDS = st.integers(0, 1 << 20)
RANGES = st.tuples(st.integers(0, 90), st.integers(0, 20), st.integers(1, 80))  # rows there are, start, length


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EmulatedKernel]]:
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "device_sms", lambda: 132)
        sources = [*norm.sources(), *gather.sources(), *copies.sources()]
        yield {source.name: EmulatedKernel(source, folder) for source in sources}


@pytest.mark.parametrize("variant", norm.VARIANTS)
@settings(deadline=None, max_examples=30)
@given(
    hidden_size=st.integers(1, 130).map(lambda vectors: 8 * vectors) | st.sampled_from([4096, 5120]),
    span=RANGES,
    sms=st.sampled_from([1, 2, 132]),
    seed=SEEDS,
)
@example(hidden_size=4096, span=(90, 3, 80), sms=1, seed=0)  # 7 rows a CTA
def test_norm(
    kernels: dict[str, EmulatedKernel],
    variant: norm.Variant,
    hidden_size: int,
    span: tuple[int, int, int],
    sms: int,
    seed: int,
) -> None:
    count, start, length = span
    stop, rng = start + length, np.random.default_rng(seed)
    done = slice(start, max(start, min(stop, count)))
    hidden, delta, weight = normal(rng, stop + 3, hidden_size), normal(rng, stop, hidden_size), normal(rng, hidden_size)
    listed, normed = int32(rng.integers(0, stop + 3, stop)), aligned(np.full((stop, hidden_size), np.nan, bfloat16))
    number = int32([count])
    expected = hidden.copy()
    if variant == "add":
        expected[done] = (hidden[done].astype(np.float32) + delta[done].astype(np.float32)).astype(bfloat16)
    loader: Any = EmulatedLoader(kernels, readable=(hidden, delta), seed=seed)
    norm.RmsNorm(loader, hidden_size, EPS, variant).launch(
        hidden=pointer(hidden), weight=pointer(weight), normed=pointer(normed), delta=pointer(delta),
        rows=pointer(listed), count=pointer(number), start=start, stop=stop, sms=sms, stream=0,
    )  # fmt: skip
    assert (hidden == expected).all()
    source = (hidden[listed] if variant == "gather" else hidden)[done].astype(np.float64)
    reference = source / np.sqrt((source**2).mean(-1, keepdims=True) + EPS) * weight.astype(np.float64)
    assert (np.abs(normed[done].astype(np.float64) - reference) <= ROUNDING * np.abs(reference)).all()
    assert np.isnan(np.delete(normed, done, axis=0).astype(np.float32)).all()


@settings(deadline=None, max_examples=40)
@given(span=RANGES, vectors=st.integers(1, 70), seed=SEEDS)
def test_embed(kernels: dict[str, EmulatedKernel], span: tuple[int, int, int], vectors: int, seed: int) -> None:
    """Ids that are given go into the token buffer; others are found there."""
    count, start, length = span
    stop, rng, slots, positions, vocab = start + length, np.random.default_rng(seed), 5, 30, 77
    done = slice(start, max(start, min(stop, count)))
    tokens, places = int32(rng.integers(0, vocab, (slots, positions))), rng.permutation(slots * positions)[:stop]
    given_ids = np.where(rng.random(stop) < 0.5, rng.integers(0, vocab, stop), -1)
    buffer, at = tokens.copy(), (places // positions, places % positions)
    for i in range(done.start, done.stop):
        if given_ids[i] >= 0:
            buffer[at[0][i], at[1][i]] = given_ids[i]
    table, hidden = normal(rng, vocab, 8 * vectors), aligned(np.full((stop, 8 * vectors), np.nan, bfloat16))
    arrays = [int32(given_ids), int32(at[0]), int32(at[1]), int32([count])]
    loader: Any = EmulatedLoader(kernels, readable=(), constant=(table,), seed=seed)
    gather.Embed(loader, 8 * vectors, positions).launch(
        table=pointer(table), hidden=pointer(hidden), tokens=pointer(tokens), token_ids=pointer(arrays[0]),
        token_slots=pointer(arrays[1]), positions=pointer(arrays[2]), count=pointer(arrays[3]), start=start, stop=stop,
        sms=2, stream=0,
    )  # fmt: skip
    assert (tokens == buffer).all()
    assert (hidden[done] == table[buffer[at[0][done], at[1][done]]]).all()
    assert np.isnan(np.delete(hidden, done, axis=0).astype(np.float32)).all()


@settings(deadline=None, max_examples=40)
@given(
    layers=st.integers(1, 3), vectors=st.integers(1, 40) | st.integers(1000, 1100), count=st.integers(0, 6), seed=SEEDS
)
def test_page_copies(kernels: dict[str, EmulatedKernel], layers: int, vectors: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = aligned(rng.integers(0, 256, (layers, 9, 16 * vectors), np.uint8))
    target = aligned(rng.integers(0, 256, (layers, 13, 16 * vectors), np.uint8))
    pairs, number = int32(np.stack([rng.integers(0, 9, 6), rng.permutation(13)[:6]], axis=1)), int32([count])
    expected = target.copy()
    expected[:, pairs[:count, 1]] = source[:, pairs[:count, 0]]
    loader: Any = EmulatedLoader(kernels, readable=(source,), seed=seed)
    copies.PageCopy(loader, layers=layers, page_bytes=16 * vectors).launch(
        source=pointer(source), destination=pointer(target), pairs=pointer(pairs), count=pointer(number),
        source_stride=source[0].nbytes, destination_stride=target[0].nbytes, sms=1, stream=0,
    )  # fmt: skip
    assert (target == expected).all()


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 301), max_size=4), stride=st.integers(301, 310), seed=SEEDS)
def test_forks(kernels: dict[str, EmulatedKernel], lengths: list[int], stride: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, number = int32(rng.integers(0, 1000, (9, stride))), int32([len(lengths)])
    forks = int32([(int(rng.integers(0, 5)), 5 + i, length) for i, length in enumerate(lengths)] or [(0, 0, 0)])
    expected = tokens.copy()
    for source, target, length in forks[: len(lengths)]:
        expected[target, :length] = tokens[source, :length]
    loader: Any = EmulatedLoader(kernels, readable=(), seed=seed)
    copies.RowForks(loader, stride).launch(
        tokens=pointer(tokens), forks=pointer(forks), count=pointer(number), sms=2, stream=0
    )
    assert (tokens == expected).all()
