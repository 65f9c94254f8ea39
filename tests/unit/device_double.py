"""A GPU's memory, streams and events on the host. A copy is done only when somebody waits: as late as it may be."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from nf.kernels.device import DeviceMemoryError

COPIES: list[int] = []  # bytes of every copy since the double was installed
LIVE: list[object] = []  # what is allocated now
_queue: list[Callable[[], None]] = []  # one stream in the order of its work


class Memory:
    """Both kinds of memory: host bytes with an address."""

    def __init__(self, num_bytes: int, _purpose: str = "", *, in_pieces: bool = False) -> None:  # noqa: ARG002
        _allocate(self)
        self.num_bytes = num_bytes
        self.array = np.full(num_bytes, 0xAB, np.uint8)
        self.pointer = self.array.ctypes.data

    def zero(self) -> Memory:
        self.array[:] = 0
        return self

    def free(self) -> None:
        self.array[:] = 0xCD  # whoever still uses it sees nonsense
        self.pointer = 0
        _free(self)


class Event:
    def __init__(self) -> None:
        _allocate(self)
        self._reached = True

    def record(self, _stream: int) -> None:
        def reach() -> None:
            self._reached = True

        self._reached = False
        _queue.append(reach)

    def synchronize(self) -> None:
        while not self._reached:
            _queue.pop(0)()

    def free(self) -> None:
        _free(self)


_left: list[int] = []  # allocations until one fails; empty: none does


@contextmanager
def memory_for(allocations: int) -> Iterator[None]:
    """Memory suffices for so many allocations: the next one fails."""
    _left[:] = [allocations]
    try:
        with pytest.raises(DeviceMemoryError):
            yield
    finally:
        _left.clear()


def check_that_failures_leave_nothing(make: Callable[[], Any]) -> None:
    """Whichever of the allocations of ``make`` fails, none is left; nor once what it makes is freed, which may be done
    again."""
    made = make()
    allocations = len(LIVE)
    made.free()
    made.free()
    assert LIVE == []
    for before in range(allocations):
        with memory_for(before):
            make()
        assert LIVE == []


def _allocate(item: object) -> None:
    if _left:
        _left[0] -= 1
        if _left[0] < 0:
            raise DeviceMemoryError("there is no memory left")
    LIVE.append(item)


def _free(item: object) -> None:
    LIVE[:] = [other for other in LIVE if other is not item]  # again does nothing


def copy(destination: int, source: int, num_bytes: int, _stream: int) -> None:
    COPIES.append(num_bytes)
    _queue.append(lambda: ctypes.memmove(destination, source, num_bytes))


def finish() -> None:
    """Do everything enqueued."""
    while _queue:
        _queue.pop(0)()


def enqueue(work: Callable[[], None]) -> None:
    """Put work between the copies, as a kernel is."""
    _queue.append(work)


def install(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """Let ``module`` use the double instead of the driver."""
    for state in (_queue, COPIES, LIVE):
        state.clear()
    doubles = {"DeviceMemory": Memory, "PinnedMemory": Memory, "Event": Event, "copy": copy}
    for name, double in doubles.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, double)


def at(pointer: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The array at an address, as a view."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_uint8 * num_bytes).from_address(pointer)
    return np.frombuffer(buffer, dtype).reshape(shape)
