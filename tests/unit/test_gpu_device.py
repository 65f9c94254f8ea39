"""Memory of the GPU and page-locked memory, down to the driver's answers, on a double of the driver."""

from __future__ import annotations

import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nf.kernels import device
from nf.kernels.device import CudaError, DeviceMemory, DeviceMemoryError, Event, PinnedMemory, checked

GIB = 1 << 30


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_NOT_SUPPORTED = 801


class Driver:
    """Notes calls by name; ``answers`` are those that are not plain success."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.arguments: dict[str, Any] = {}  # of each call's last
        self.answers: dict[str, Any] = {
            "cuMemAlloc": (Result.CUDA_SUCCESS, 4096),
            "cuMemGetInfo": (Result.CUDA_SUCCESS, 3 * GIB // 2, 16 * GIB),
            "cuEventCreate": (Result.CUDA_SUCCESS, 7),
        }
        self.CUresult = Result
        self.CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            self.arguments[name] = arguments
            return self.answers.get(name, (Result.CUDA_SUCCESS,))

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    double = Driver()
    bindings = ModuleType("cuda.bindings")
    bindings.driver = double  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return double


def test_values_of_a_call(driver: Driver) -> None:
    assert checked((Result.CUDA_SUCCESS,)) == ()
    assert checked((Result.CUDA_SUCCESS, 5)) == 5
    assert checked((Result.CUDA_SUCCESS, 5, 6)) == (5, 6)
    with pytest.raises(CudaError, match=r"^the CUDA driver answered CUDA_ERROR_NOT_SUPPORTED$"):
        checked((Result.CUDA_ERROR_NOT_SUPPORTED, 5))
    assert driver.calls == []


def test_too_little_memory_says_what_is_needed_and_what_is_free(driver: Driver) -> None:
    driver.answers["cuMemAlloc"] = (Result.CUDA_ERROR_OUT_OF_MEMORY, 0)
    with pytest.raises(DeviceMemoryError, match=r"^weights need 2\.25 GiB of GPU memory, and 1\.50 of 16\.00 GiB"):
        DeviceMemory(9 * GIB // 4, "weights")


def test_too_little_memory_for_what_the_driver_makes_says_what_is_free(driver: Driver) -> None:
    with pytest.raises(DeviceMemoryError, match=r"needs more GPU memory than there is: 1\.50 of 16\.00 GiB are free$"):
        checked((Result.CUDA_ERROR_OUT_OF_MEMORY, None))
    driver.answers["cuMemGetInfo"] = (Result.CUDA_ERROR_NOT_SUPPORTED, 0, 0)
    with pytest.raises(DeviceMemoryError, match=r"does not say how much is free$"):
        checked((Result.CUDA_ERROR_OUT_OF_MEMORY, None))


def test_what_says_that_it_waits_does(driver: Driver) -> None:
    """The driver may return from either before the GPU is done."""
    memory = DeviceMemory(64, "a test").zero()
    memory.upload(np.zeros(4, np.int32), 16)
    assert driver.calls == ["cuMemAlloc", "cuMemsetD8", "cuStreamSynchronize", "cuMemcpyHtoD", "cuStreamSynchronize"]
    with pytest.raises(AssertionError):
        memory.upload(np.zeros(4, np.int32), 52)
    memory.free()
    memory.free()
    assert driver.calls.count("cuMemFree") == 1


@pytest.mark.parametrize("num_bytes", [0, 5, 3 * device._PIECE_BYTES + 7])
def test_page_locked_memory(driver: Driver, num_bytes: int) -> None:
    memory = PinnedMemory(num_bytes)
    assert memory.array.shape == (num_bytes,)
    assert memory.pointer % 4096 == 0
    assert not memory.array.any()
    mapped = 2  # CU_MEMHOSTREGISTER_DEVICEMAP: pages are swapped by a kernel
    assert driver.arguments["cuMemHostRegister"] == (memory.pointer, max(1, num_bytes), mapped)
    memory.free()
    memory.free()
    assert driver.calls == ["cuMemHostRegister", "cuMemHostUnregister"]


class Locks:
    """Of a driver that locks at most so many bytes at a time, and so many pieces."""

    def __init__(self, most_bytes: int, most_pieces: int) -> None:
        self.held: dict[int, int] = {}
        self._most_bytes, self._most_pieces = most_bytes, most_pieces

    def lock(self, pointer: int, num_bytes: int, flags: int) -> tuple[Result]:
        assert pointer not in self.held
        assert flags == 2  # CU_MEMHOSTREGISTER_DEVICEMAP
        if num_bytes > self._most_bytes or len(self.held) == self._most_pieces:
            return (Result.CUDA_ERROR_OUT_OF_MEMORY,)
        self.held[pointer] = num_bytes
        return (Result.CUDA_SUCCESS,)

    def unlock(self, pointer: int) -> tuple[Result]:
        del self.held[pointer]
        return (Result.CUDA_SUCCESS,)


@pytest.mark.parametrize("num_bytes", [1, 4096, 3 * 4096, 3 * 4096 + 7])
def test_memory_locked_in_pieces(driver: Driver, monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(device, "_PIECE_BYTES", 4096)
    locks = Locks(4096, 4)
    driver.cuMemHostRegister, driver.cuMemHostUnregister = locks.lock, locks.unlock
    memory = PinnedMemory(num_bytes, in_pieces=True)
    assert not memory.array.any()
    assert sum(locks.held.values()) == num_bytes
    end = memory.pointer
    for start, length in sorted(locks.held.items()):  # one after the other
        assert start == end
        end = start + length
    memory.free()
    assert not locks.held


def test_when_a_piece_cannot_be_locked_none_stays_locked(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_PIECE_BYTES", 4096)
    locks = Locks(4096, 2)
    driver.cuMemHostRegister, driver.cuMemHostUnregister = locks.lock, locks.unlock
    with pytest.raises(CudaError, match=r"cannot be locked for the GPU: CUDA_ERROR_OUT_OF_MEMORY$"):
        PinnedMemory(3 * 4096, in_pieces=True)
    assert not locks.held


def test_ram_that_cannot_be_locked_or_had(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.answers["cuMemHostRegister"] = (Result.CUDA_ERROR_OUT_OF_MEMORY,)
    with pytest.raises(CudaError, match=r"^0\.25 GiB of RAM cannot be locked for the GPU: CUDA_ERROR_OUT_OF_MEMORY$"):
        PinnedMemory(GIB // 4)

    def refuse(*_: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(device, "mmap", SimpleNamespace(mmap=refuse, PAGESIZE=4096))
    with pytest.raises(CudaError, match=r"^4\.00 GiB of RAM cannot be had: Cannot allocate memory$"):
        PinnedMemory(4 * GIB)


def test_whether_an_event_was_reached(driver: Driver) -> None:
    event = Event(timing=True)
    assert event.reached
    driver.answers["cuEventQuery"] = (Result.CUDA_ERROR_NOT_READY,)
    assert not event.reached
    driver.answers["cuEventQuery"] = (Result.CUDA_ERROR_NOT_SUPPORTED,)
    with pytest.raises(CudaError, match="NOT_SUPPORTED"):
        assert event.reached
