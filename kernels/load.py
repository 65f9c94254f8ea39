"""Loading compiled kernels and launching them on an explicit stream.

Launches go through ctypes: nothing is allocated on the device, a few µs of host time, the same call inside a graph
capture or not. They are methods by name, here and in the classes around: for ``__call__`` Python would build a
dictionary of the keyword arguments, which takes as long as the rest. A loaded kernel keeps its arguments in memory of
its own, so one thread launches it at a time.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nf.kernels.compile import Artifact
from nf.kernels.device import CudaError, DeviceMemoryError, checked, free_memory
from nf.kernels.source import LAUNCHER, ParameterKind

Value = int | float | bytes
"""Of a launch argument: a pointer is an integer, a struct of pointers its bytes."""

_FORMATS = {"pointer": "Q", "int32": "i", "int64": "q", "float32": "f"}
"""Of ``struct``, in the machine's own sizes and alignment."""

_OUT_OF_MEMORY = 2  # of the driver and of the runtime alike


class LaunchError(CudaError):
    """A kernel cannot be loaded or launched."""


class KernelLoader:
    """Loads kernels by name, and unloads all of them at once.

    Args:
        artifacts: what there is to load.
    """

    def __init__(self, artifacts: Iterable[Artifact]) -> None:
        self._artifacts = {artifact.source.name: artifact for artifact in artifacts}
        self._undo = ExitStack()

    def cute(self, name: str) -> CuteKernel:
        """A kernel of the CuTe DSL. Raises CudaError if it cannot be loaded."""
        return CuteKernel(self._artifacts[name])

    def cuda(self, name: str, *, shared_bytes: int = 0) -> CudaKernel:
        """A CUDA C++ kernel that is launched with ``shared_bytes``. Raises CudaError if it cannot be loaded."""
        kernel = CudaKernel(self._artifacts[name], shared_bytes=shared_bytes)
        self._undo.callback(kernel.unload)
        return kernel

    def free(self) -> None:
        """Unload; idempotent. Nothing may launch the kernels any more, and no graph that has them may still exist."""
        self._undo.close()


class CuteKernel:
    """A CuTe DSL kernel with its own host launcher: grid, clusters and TMA descriptors are the launcher's business."""

    def __init__(self, artifact: Artifact) -> None:
        self.name = artifact.source.name
        library = _launcher(artifact.path)
        mangled = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, f"{LAUNCHER}_function_name")))
        self._launch = library[mangled.decode()]
        self._status = ctypes.c_int32()
        self._set_arguments, addresses = _arguments((*artifact.source.parameters, "pointer"))
        addresses.append(ctypes.addressof(self._status))
        self._arguments, self._count = (ctypes.c_void_p * len(addresses))(*addresses), len(addresses)

    def launch(self, *values: Value, stream: int) -> None:
        """Launch with one value per parameter of the source on ``stream``.

        Raises:
            CudaError: the driver refused.
        """
        self._set_arguments(*values, stream)
        self._launch(self._arguments, self._count)
        if self._status.value:
            raise _refusal(self.name, "launching", self._status.value)


_LOADING = threading.Lock()


def _launcher(path: Path) -> ctypes.CDLL:
    """The shared library of a CuTe DSL kernel, its cubin on the device, so that no launch or capture has to load it.

    It stays for as long as the process, and all executors share it: its launcher keeps the kernel in a variable of the
    library, of which a process has one however often it opens it. Loading the cubin again would put another kernel in
    there, and unloading would leave none for other executors. All use the one device of the process.

    Raises:
        CudaError: the driver refused.
    """
    with _LOADING:  # engines may be started by several threads
        return _loaded_launcher(path)


@functools.cache
def _loaded_launcher(path: Path) -> ctypes.CDLL:
    _load_runtime()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # e.g. linked for a newer C library
        raise LaunchError(f"{path}: {error}") from None
    module, status = ctypes.c_void_p(), ctypes.c_int32()
    where, device = ctypes.c_void_p(ctypes.addressof(module)), ctypes.c_int32(_current_device())
    for step, arguments in (("init", (where, status)), ("load_to_device", (where, device, status))):
        library[f"_mlir_{LAUNCHER}_cuda_{step}"](_addresses(*arguments))
        if status.value:
            raise _refusal(path.stem, "loading", status.value)
    return library


class CudaKernel:
    """A CUDA C++ kernel from a cubin; the caller chooses grid, block and shared memory."""

    def __init__(self, artifact: Artifact, *, shared_bytes: int = 0) -> None:
        from cuda.bindings import driver

        self.name = artifact.source.name
        self.shared_bytes = shared_bytes
        self._library = checked(driver.cuLibraryLoadFromFile(str(artifact.path).encode(), [], [], 0, [], [], 0))
        with ExitStack() as undo:
            undo.callback(self.unload)
            kernel = checked(driver.cuLibraryGetKernel(self._library, artifact.source.entry.encode()))
            if shared_bytes > 48 * 1024:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                checked(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, _current_device()))
            undo.pop_all()
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

    def launch(self, *values: Value, grid: int, block: int, stream: int, pdl: bool = False) -> None:
        """Launch ``grid`` CTAs of ``block`` threads; ``pdl`` lets it start before the kernel before it has ended.

        Raises:
            CudaError: the driver refused.
        """
        self._set_arguments(*values)
        placed = (grid, block, stream, pdl)
        if placed != self._placed:
            self._place(*placed)
        self.relaunch()

    def relaunch(self) -> None:
        """Launch as the last time, which takes little more than the driver's own part.

        Raises:
            CudaError: the driver refused.
        """
        status = self._launch()
        if status:
            raise _refusal(self.name, "launching", status)

    def unload(self) -> None:
        """Unload the cubin; no launch may come or be under way, and no graph that has the kernel may still exist."""
        from cuda.bindings import driver

        checked(driver.cuLibraryUnload(self._library))

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
    formats = [f"0Q{8 * kind}s" if isinstance(kind, int) else _FORMATS[kind] for kind in kinds]  # 0Q: aligned as one
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
