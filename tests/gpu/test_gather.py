"""Embedding gather, page copies and token-buffer forks against plain indexing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nf.kernels import copies, device, gather
from nf.kernels.device import PinnedMemory
from nf.kernels.load import KernelLoader
from nf.kernels.registry import artifacts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def int32(values: Any) -> Any:
    return torch.tensor(np.asarray(values), device="cuda", dtype=torch.int32)


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


@pytest.mark.parametrize("hidden_size", [8, 200, 4096, 16384])
@pytest.mark.parametrize(("count", "start", "stop"), [(0, 0, 90), (1, 0, 90), (90, 0, 90), (90, 20, 61), (30, 20, 61)])
def test_embed(hidden_size: int, count: int, start: int, stop: int) -> None:
    rng = np.random.default_rng(count + start)
    slots, length, vocab = 5, 40, 77
    tokens = int32(rng.integers(0, vocab, (slots, length)))
    places = rng.permutation(slots * length)[:90]
    token_slots, positions = places // length, places % length
    token_ids = np.where(rng.random(90) < 0.5, rng.integers(0, vocab, 90), -1)
    table = torch.randn(vocab, hidden_size, device="cuda").bfloat16()
    hidden = torch.full((90, hidden_size), float("nan"), device="cuda").bfloat16()
    arrays = [int32(token_ids), int32(token_slots), int32(positions), int32([count])]
    expected = tokens.cpu().numpy()
    done = slice(start, max(start, min(stop, count)))
    for i in range(done.start, done.stop):
        if token_ids[i] >= 0:
            expected[token_slots[i], positions[i]] = token_ids[i]
    gather.Embed(KernelLoader(artifacts(gather.sources(), "sm_90a")), hidden_size, length).launch(
        table=table.data_ptr(), hidden=hidden.data_ptr(), tokens=tokens.data_ptr(), token_ids=arrays[0].data_ptr(),
        token_slots=arrays[1].data_ptr(), positions=arrays[2].data_ptr(), count=arrays[3].data_ptr(),
        start=start, stop=stop, sms=3, stream=stream(), pdl=True,
    )  # fmt: skip
    assert (tokens.cpu().numpy() == expected).all()
    ids = torch.from_numpy(expected[token_slots[done], positions[done]]).cuda().long()
    assert torch.equal(hidden[done], table[ids])
    assert hidden.isnan().all(dim=1).sum() == 90 - (done.stop - done.start)


@pytest.mark.parametrize("page_bytes", [16, 4096, 4112, 65536])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_page_copies(page_bytes: int, count: int) -> None:
    layers, pages = 3, 20
    cache = torch.randint(0, 256, (layers, pages, page_bytes), device="cuda", dtype=torch.uint8)
    order = np.random.default_rng(0).permutation(pages)
    pairs = np.stack([order[:9], order[9:18]], axis=1)
    expected = cache.clone()
    expected[:, pairs[:count, 1]] = cache[:, pairs[:count, 0]]
    listed, number = int32(pairs), int32([count])
    copies.PageCopy(KernelLoader(artifacts(copies.sources(), "sm_90a")), layers=layers, page_bytes=page_bytes).launch(
        source=cache.data_ptr(), destination=cache.data_ptr(), pairs=listed.data_ptr(),
        count=number.data_ptr(), source_stride=pages * page_bytes, destination_stride=pages * page_bytes,
        sms=2, stream=stream(),
    )  # fmt: skip
    assert torch.equal(cache, expected)


def test_pages_swap_to_pinned_memory_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also across the pieces that it is locked in."""
    monkeypatch.setattr(device, "_PIECE_BYTES", 8192)
    layers, pages, page_bytes = 2, 8, 6144
    cache = torch.randint(0, 256, (layers, pages, page_bytes), device="cuda", dtype=torch.uint8)
    host = PinnedMemory(layers * 5 * page_bytes, in_pieces=True)
    copy = copies.PageCopy(KernelLoader(artifacts(copies.sources(), "sm_90a")), layers=layers, page_bytes=page_bytes)
    here, away = (cache.data_ptr(), pages * page_bytes), (host.pointer, 5 * page_bytes)
    expected = cache.clone()
    expected[:, [6, 0]] = cache[:, [2, 7]]
    for pairs, (source, source_stride), (target, target_stride) in (
        ([[2, 4], [7, 1]], here, away),
        ([[4, 6], [1, 0]], away, here),
    ):
        listed, number = int32(pairs), int32([2])
        copy.launch(
            source=source, destination=target, pairs=listed.data_ptr(), count=number.data_ptr(),
            source_stride=source_stride, destination_stride=target_stride, sms=1, stream=stream(),
        )  # fmt: skip
    assert torch.equal(cache, expected)
    swapped = host.array.reshape(layers, 5, page_bytes)[:, [4, 1]]
    assert (swapped == expected[:, [2, 7]].cpu().numpy()).all()
    host.free()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_forks(count: int) -> None:
    tokens = torch.randint(0, 1000, (9, 1001), device="cuda", dtype=torch.int32)
    forks = [(0, 5, 1001), (0, 6, 1), (3, 7, 0), (4, 8, 700)]
    expected = tokens.clone()
    for source, destination, length in forks[:count]:
        expected[destination, :length] = tokens[source, :length]
    listed, number = int32(forks), int32([count])
    copies.RowForks(KernelLoader(artifacts(copies.sources(), "sm_90a")), 1001).launch(
        tokens=tokens.data_ptr(), forks=listed.data_ptr(), count=number.data_ptr(), sms=2, stream=stream()
    )
    assert torch.equal(tokens, expected)
