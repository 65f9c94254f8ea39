"""KV pages between GPU and host: which copies a step begins with, and host memory that is had late or not at all."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import device_double
import numpy as np
import pytest

from nf.config import ModelConfig
from nf.executors import gpu_pages
from nf.executors.gpu_pages import KvPages, page_bytes
from nf.kernels.device import CudaError

CONFIG = ModelConfig("LlamaForCausalLM", 64, 64, 128, 3, 4, 2, 64, 1e-5, 64)
PAGE, PAGES, HOST_PAGES = 16, 5, 4
DEVICE: Any = SimpleNamespace(use=lambda: None)
INPUTS = {name: index for index, name in enumerate(("swap_out", "swap_in", "page_copies"))}
INPUTS |= {f"num_{name}": 10 + index for name, index in INPUTS.items()}


def make(num_host_pages: int = HOST_PAGES) -> KvPages:
    return KvPages(CONFIG, device=DEVICE, page_size=PAGE, num_pages=PAGES, num_host_pages=num_host_pages)


def step(swap_out: int = 0, swap_in: int = 0, copies: int = 0) -> Any:
    moves = {"swap_out": swap_out, "swap_in": swap_in, "page_copies": copies}
    return SimpleNamespace(**{name: np.zeros((count, 2), np.int32) for name, count in moves.items()})


def moved(pages: KvPages, batch: Any) -> list[dict[str, int]]:
    """What the copying kernel was launched with, in order."""
    launches: list[dict[str, int]] = []
    copy: Any = SimpleNamespace(launch=lambda **values: launches.append(values))
    pages.move(batch, copy, INPUTS, 132, 7)
    return launches


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    device_double.install(monkeypatch, gpu_pages)


def test_copies_are_launched_in_the_order_of_a_batch() -> None:
    pages = make()
    assert moved(pages, step()) == []
    layer = PAGES * page_bytes(CONFIG, PAGE)
    out, back, copies = moved(pages, step(swap_out=1, swap_in=2, copies=3))
    assert (out["pairs"], back["pairs"], copies["pairs"]) == (0, 1, 2)
    assert (out["count"], back["count"], copies["count"]) == (10, 11, 12)
    here, there = pages.pointer, out["destination"]
    assert (out["source"], back["destination"], copies["source"], copies["destination"]) == (here,) * 4
    assert back["source"] == there != here
    assert out["source_stride"] == back["destination_stride"] == copies["source_stride"] == layer
    assert out["destination_stride"] == back["source_stride"] == HOST_PAGES * page_bytes(CONFIG, PAGE)
    (alone,) = moved(pages, step(copies=1))
    assert alone["pairs"] == 2
    pages.free()


def test_pages_are_zeros_at_first_and_given_back_once() -> None:
    pages = make()
    assert page_bytes(CONFIG, PAGE) == 2 * 2 * 64 * PAGE * 2
    assert not device_double.at(pages.pointer, (3 * PAGES * page_bytes(CONFIG, PAGE),), np.uint8).any()
    pages.free()
    pages.free()
    assert device_double.LIVE == []


def test_without_host_pages_the_rest_works() -> None:
    pages = make(num_host_pages=0)
    assert len(moved(pages, step(copies=1))) == 1
    pages.free()
    assert device_double.LIVE == []


def test_the_first_swap_waits_for_host_pages_and_other_steps_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def late(num_bytes: int, *, in_pieces: bool) -> Any:
        assert in_pieces
        assert go_on.wait(5)
        return device_double.Memory(num_bytes)

    monkeypatch.setattr(gpu_pages, "PinnedMemory", late)
    pages = make()
    assert len(moved(pages, step(copies=1))) == 1
    swapped: list[Any] = []
    swap = threading.Thread(target=lambda: swapped.extend(moved(pages, step(swap_out=1))))
    swap.start()
    swap.join(0.05)
    assert not swapped
    go_on.set()
    swap.join(5)
    assert len(swapped) == 1
    pages.free()
    assert device_double.LIVE == []


def test_host_pages_that_cannot_be_had_are_told_before_anything_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_num_bytes: int, **_options: Any) -> Any:
        raise CudaError("4.00 GiB of RAM cannot be had")

    monkeypatch.setattr(gpu_pages, "PinnedMemory", refuse)
    pages = make()
    pages._host.exception(timeout=5)
    with pytest.raises(CudaError, match=r"^4\.00 GiB of RAM"):
        moved(pages, step())
    pages.free()
    assert device_double.LIVE == []


def test_too_many_pages() -> None:
    with device_double.memory_for(0):
        make()
    assert device_double.LIVE == []
