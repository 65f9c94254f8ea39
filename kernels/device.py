"""A GPU as the engine sees it: its memory, streams and events, through the CUDA driver.

Pointers and handles are plain integers, as kernels take them. A thread calls ``Device.use`` before it touches any of
this: the driver keeps the current context per thread.
"""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf.errors import NfError

_PIECE_BYTES = 64 << 20  # of pinned memory that a thread makes, or the driver locks, at a time
_PAUSE = 1e-3  # seconds between two pieces that are locked
_TOUCHING_THREADS = 4  # more are not faster
_FOR_KERNELS = 2  # CU_MEMHOSTREGISTER_DEVICEMAP: not only copies, kernels reach it as well


class CudaError(NfError, RuntimeError):
    """The CUDA driver refused."""


class DeviceMemoryError(CudaError):
    """The GPU has not as much memory free as was asked for."""


def checked(result: tuple[Any, ...]) -> Any:
    """The values of a driver call: none, one, or a tuple.

    Raises:
        DeviceMemoryError: the GPU's memory does not suffice; the message says how much is free.
        CudaError: the driver answered with another error, which the message names.
    """
    status, *values = result
    if int(status):
        if status.name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise DeviceMemoryError(f"the CUDA driver needs more GPU memory than there is: {free_memory()}")
        raise CudaError(f"the CUDA driver answered {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def free_memory() -> str:
    """What is free on the current GPU, for messages."""
    from cuda.bindings import driver

    status, free, total = driver.cuMemGetInfo()
    if int(status):  # the error that is to be told is another
        return "the driver does not say how much is free"
    return f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free"


class Device:
    """One GPU and its primary context, which is made current for the calling thread.

    Raises:
        CudaError: there is no driver or no such GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        from cuda.bindings import driver

        checked(driver.cuInit(0))
        self.handle = checked(driver.cuDeviceGet(ordinal))
        self._context = checked(driver.cuDevicePrimaryCtxRetain(self.handle))
        self.use()
        self.name: str = checked(driver.cuDeviceGetName(256, self.handle)).partition(b"\0")[0].decode()
        self.sms = self._attribute("MULTIPROCESSOR_COUNT")
        major, minor = self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR")
        self.arch = f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    def use(self) -> None:
        """Make the context current for the calling thread."""
        from cuda.bindings import driver

        checked(driver.cuCtxSetCurrent(self._context))

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        from cuda.bindings import driver

        free, total = checked(driver.cuMemGetInfo())
        return int(free), int(total)

    def _attribute(self, name: str) -> int:
        from cuda.bindings import driver

        attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(checked(driver.cuDeviceGetAttribute(attribute, self.handle)))


class DeviceMemory:
    """Bytes on the current GPU, at least 256-byte aligned, of any content.

    Raises:
        DeviceMemoryError: there is not as much; ``purpose`` tells the reader of the message what needs it.
    """

    def __init__(self, num_bytes: int, purpose: str) -> None:
        from cuda.bindings import driver

        self.num_bytes = num_bytes
        self.pointer = 0
        try:
            self.pointer = int(checked(driver.cuMemAlloc(max(1, num_bytes))))
        except DeviceMemoryError:
            needed = f"{purpose} need {num_bytes / 2**30:.2f} GiB of GPU memory"
            raise DeviceMemoryError(f"{needed}, and {free_memory()}") from None

    def zero(self) -> DeviceMemory:
        """Fill with zero bytes and wait."""
        from cuda.bindings import driver

        checked(driver.cuMemsetD8(self.pointer, 0, self.num_bytes))
        _wait_for_default_stream()
        return self

    def upload(self, array: NDArray[Any], offset: int = 0) -> None:
        """Copy a host array to ``offset`` bytes from the start and wait."""
        from cuda.bindings import driver

        array = np.ascontiguousarray(array)
        assert offset + array.nbytes <= self.num_bytes
        checked(driver.cuMemcpyHtoD(self.pointer + offset, array.ctypes.data, array.nbytes))
        _wait_for_default_stream()

    def download(self, array: NDArray[Any], offset: int = 0) -> None:
        """Fill a contiguous host array from ``offset`` bytes from the start and wait."""
        from cuda.bindings import driver

        assert array.flags.c_contiguous
        assert offset + array.nbytes <= self.num_bytes
        checked(driver.cuMemcpyDtoH(array.ctypes.data, self.pointer + offset, array.nbytes))

    def free(self) -> None:
        """Give the bytes back; idempotent. Nothing may use them any more."""
        from cuda.bindings import driver

        if self.pointer:
            checked(driver.cuMemFree(self.pointer))
            self.pointer = 0


class PinnedMemory:
    """Page-locked host bytes, zeros at first, that the GPU copies from and to without waiting; ``array`` is a uint8
    view. Kernels address them by the same pointer.

    The pages are made by threads of ours before the driver locks them: it would make them alone, and keep all other
    driver calls of the process waiting (1.3 s for 4 GiB, against 0.15 s of locking).

    Args:
        in_pieces: locked piece by piece, so that other calls wait for no more than a piece. One driver copy must not
            cross pieces; kernels may.

    Raises:
        CudaError: there is not as much RAM, or it cannot be locked.
    """

    def __init__(self, num_bytes: int, *, in_pieces: bool = False) -> None:
        self.num_bytes = num_bytes
        try:
            pages = mmap.mmap(-1, max(1, num_bytes))
        except OSError as error:
            raise CudaError(f"{num_bytes / 2**30:.2f} GiB of RAM cannot be had: {error.strerror}") from error
        whole = np.frombuffer(pages, np.uint8)
        _touch(whole)
        self.pointer = int(whole.ctypes.data)
        self.array: NDArray[np.uint8] = whole[:num_bytes]
        self._locked: list[int] = []  # where pieces begin
        self._lock(len(whole), _PIECE_BYTES if in_pieces else len(whole))

    def _lock(self, num_bytes: int, step: int) -> None:
        from cuda.bindings import driver

        for start in range(0, num_bytes, step):
            if start:
                time.sleep(_PAUSE)  # whoever waits for the driver has his turn
            piece = self.pointer + start
            (status,) = driver.cuMemHostRegister(piece, min(step, num_bytes - start), _FOR_KERNELS)
            if int(status):
                for locked in self._locked:
                    driver.cuMemHostUnregister(locked)  # whatever it says: there is an error to tell already
                raise CudaError(f"{self.num_bytes / 2**30:.2f} GiB of RAM cannot be locked for the GPU: {status.name}")
            self._locked.append(piece)

    def free(self) -> None:
        """Give the bytes back; idempotent. No copy may be under way."""
        from cuda.bindings import driver

        while self._locked:
            checked(driver.cuMemHostUnregister(self._locked[-1]))
            self._locked.pop()
        self.pointer = 0
        self.array = np.empty(0, np.uint8)  # the last view gives the pages back


def _wait_for_default_stream() -> None:
    """The driver may return before a fill, or the last piece of a copy, is done, and our streams do not wait for it."""
    from cuda.bindings import driver

    checked(driver.cuStreamSynchronize(0))


def _touch(pages: NDArray[np.uint8]) -> None:
    """Make all pages, large ones on several threads."""
    pieces = [pages[start : start + _PIECE_BYTES : mmap.PAGESIZE] for start in range(0, len(pages), _PIECE_BYTES)]
    if len(pieces) == 1:
        pieces[0][:] = 0
        return
    with ThreadPoolExecutor(_TOUCHING_THREADS) as pool:
        list(pool.map(lambda piece: piece.fill(0), pieces))


class Stream:
    """A stream of the current context that does not wait for the default one; ``handle`` is what launches take.

    Args:
        priority: 0 is the default, lower is more urgent.
    """

    def __init__(self, priority: int = 0) -> None:
        from cuda.bindings import driver

        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.handle = int(checked(driver.cuStreamCreateWithPriority(flags, priority)))

    def synchronize(self) -> None:
        """Wait for everything enqueued; other threads of this process run meanwhile."""
        from cuda.bindings import driver

        checked(driver.cuStreamSynchronize(self.handle))

    def free(self) -> None:
        """Destroy the stream; idempotent."""
        from cuda.bindings import driver

        if self.handle:
            checked(driver.cuStreamDestroy(self.handle))
            self.handle = 0


class Event:
    """A point in a stream. ``timing`` lets two of them measure the time between; without, waiting sleeps."""

    def __init__(self, *, timing: bool = False) -> None:
        from cuda.bindings import driver

        kinds = driver.CUevent_flags
        flags = kinds.CU_EVENT_DEFAULT if timing else kinds.CU_EVENT_DISABLE_TIMING | kinds.CU_EVENT_BLOCKING_SYNC
        self.handle = checked(driver.cuEventCreate(int(flags)))

    def record(self, stream: int) -> None:
        """Mark what is enqueued on ``stream`` so far."""
        from cuda.bindings import driver

        checked(driver.cuEventRecord(self.handle, stream))

    def synchronize(self) -> None:
        """Wait for it; other threads of this process run meanwhile."""
        from cuda.bindings import driver

        checked(driver.cuEventSynchronize(self.handle))

    @property
    def reached(self) -> bool:
        """Whether the stream has come to it; does not wait."""
        from cuda.bindings import driver

        (status,) = driver.cuEventQuery(self.handle)
        if status == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        checked((status,))
        return True

    def block(self, stream: int) -> None:
        """Let what is enqueued on ``stream`` from now on wait for it."""
        from cuda.bindings import driver

        checked(driver.cuStreamWaitEvent(stream, self.handle, 0))

    def since(self, start: Event) -> float:
        """Seconds from ``start`` to this; both with ``timing``, both reached."""
        from cuda.bindings import driver

        return float(checked(driver.cuEventElapsedTime(start.handle, self.handle))) / 1e3

    def free(self) -> None:
        """Destroy the event; idempotent."""
        from cuda.bindings import driver

        if self.handle is not None:
            checked(driver.cuEventDestroy(self.handle))
            self.handle = None


def copy(destination: int, source: int, num_bytes: int, stream: int) -> None:
    """Enqueue a copy between any two of device memory and pinned memory."""
    from cuda.bindings import driver

    if num_bytes:
        checked(driver.cuMemcpyAsync(destination, source, num_bytes, stream))
