"""Loading compiled kernels and launching them on an explicit stream.

Launches go through ctypes: nothing is allocated on the device, a few µs of host time, the same call inside a graph
capture or not. A loaded kernel keeps its arguments in memory of its own, so one thread launches it at a time.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

from nf.kernels.compile import Artifact
from nf.kernels.device import CudaError, DeviceMemoryError, checked, free_memory
from nf.kernels.source import LAUNCHER, ParameterKind

_FORMATS: dict[ParameterKind, str] = {"pointer": "Q", "int32": "i", "int64": "q", "float32": "f"}
"""Of ``struct``, in the machine's own sizes and alignment."""


_OUT_OF_MEMORY = 2  # of the driver and of the runtime alike


class LaunchError(CudaError):
    """A kernel cannot be loaded or launched."""


class CuteKernel:
    """A CuTe DSL kernel with its own host launcher: grid, clusters and TMA descriptors are the launcher's business."""

    def __init__(self, artifact: Artifact) -> None:
        self.name = artifact.source.name
        _load_runtime()
        library = ctypes.CDLL(str(artifact.path))
        mangled = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, f"{LAUNCHER}_function_name")))
        self._launch = library[mangled.decode()]
        self._status = ctypes.c_int32()
        self._set_arguments, addresses = _arguments((*artifact.source.parameters, "pointer"))
        addresses.append(ctypes.addressof(self._status))
        self._arguments, self._count = (ctypes.c_void_p * len(addresses))(*addresses), len(addresses)
        # Load the embedded cubin now, so that no launch or capture has to.
        module = ctypes.c_void_p()
        where = ctypes.c_void_p(ctypes.addressof(module))
        library[f"_mlir_{LAUNCHER}_cuda_init"](_addresses(where, self._status))
        self._check("loading")
        device = ctypes.c_int32(_current_device())
        library[f"_mlir_{LAUNCHER}_cuda_load_to_device"](_addresses(where, device, self._status))
        self._check("loading")

    def __call__(self, *values: int | float, stream: int) -> None:
        """Launch with one value per parameter of the source (pointers as integers) on ``stream``.

        Raises:
            LaunchError: the driver refused.
        """
        self._set_arguments(*values, stream)
        self._launch(self._arguments, self._count)
        if self._status.value:
            self._check("launching")

    def _check(self, doing: str) -> None:
        if self._status.value:
            raise _refusal(self.name, doing, self._status.value)


class CudaKernel:
    """A CUDA C++ kernel from a cubin; the caller chooses grid, block and shared memory."""

    def __init__(self, artifact: Artifact, *, shared_bytes: int = 0) -> None:
        from cuda.bindings import driver

        self.name = artifact.source.name
        self.shared_bytes = shared_bytes
        self._library = checked(driver.cuLibraryLoadFromFile(str(artifact.path).encode(), [], [], 0, [], [], 0))
        kernel = checked(driver.cuLibraryGetKernel(self._library, artifact.source.entry.encode()))
        if shared_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, _current_device()))
        self._set_arguments, addresses = _arguments(artifact.source.parameters)
        self._config = _LaunchConfig()
        self._pdl = (_LaunchAttribute * 1)(_LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, value=(1,)))
        self._placed: tuple[int, int, int, bool] | None = None
        self._launch = functools.partial(
            _driver().cuLaunchKernelEx,
            ctypes.byref(self._config),
            ctypes.c_void_p(int(kernel)),
            (ctypes.c_void_p * len(addresses))(*addresses),
            None,
        )

    def __call__(self, *values: int | float, grid: int, block: int, stream: int, pdl: bool = False) -> None:
        """Launch ``grid`` CTAs of ``block`` threads; ``pdl`` lets it start before the kernel before it has ended.

        Raises:
            LaunchError: the driver refused.
        """
        self._set_arguments(*values)
        placed = (grid, block, stream, pdl)
        if placed != self._placed:
            self._place(*placed)
        status = self._launch()
        if status:
            raise _refusal(self.name, "launching", status)

    def _place(self, grid: int, block: int, stream: int, pdl: bool) -> None:
        """Attributes of a ctypes structure are slow to set, and seldom change."""
        config = self._config
        config.grid_x, config.block_x, config.shared_bytes, config.stream = grid, block, self.shared_bytes, stream
        config.attributes, config.num_attributes = (self._pdl, 1) if pdl else (None, 0)
        self._placed = (grid, block, stream, pdl)


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, 4 bytes of padding, a value of 64 bytes."""

    _fields_ = (("id", ctypes.c_int32), ("padding", ctypes.c_int32), ("value", ctypes.c_int32 * 16))


_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig; the unused dimensions are 1."""

    _fields_ = (
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("grid_z", ctypes.c_uint32),
        ("block_x", ctypes.c_uint32),
        ("block_y", ctypes.c_uint32),
        ("block_z", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint32),
    )

    def __init__(self) -> None:
        super().__init__(1, 1, 1, 1, 1, 1)


def _arguments(kinds: tuple[ParameterKind, ...]) -> tuple[Callable[..., None], list[int]]:
    """Memory for a value of each kind: a function that writes them all at once, and their addresses."""
    formats = [_FORMATS[kind] for kind in kinds]
    layout = struct.Struct("@" + "".join(formats))
    memory = bytearray(layout.size)
    start = ctypes.addressof((ctypes.c_char * layout.size).from_buffer(memory))
    ends = [struct.calcsize("@" + "".join(formats[: i + 1])) for i in range(len(formats))]
    addresses = [start + end - struct.calcsize(form) for end, form in zip(ends, formats, strict=True)]
    return functools.partial(layout.pack_into, memory, 0), addresses


def _addresses(*cells: Any) -> Any:
    return (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))


def _refusal(name: str, doing: str, status: int) -> CudaError:
    if status == _OUT_OF_MEMORY:
        return DeviceMemoryError(f"{name}: {doing} it needs more GPU memory than there is: {free_memory()}")
    return LaunchError(f"{name}: {doing} it failed with CUDA error {status}")


def _current_device() -> int:
    from cuda.bindings import driver

    return int(checked(driver.cuCtxGetDevice()))


@functools.cache
def device_sms() -> int:
    """Multiprocessors of the current device; all devices of a process are alike."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    return int(checked(driver.cuDeviceGetAttribute(attribute, _current_device())))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _load_runtime() -> None:
    """The launchers leave the CUDA runtime's symbols to be found among the global ones."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    path = load_nvidia_dynamic_lib("cudart").abs_path
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
