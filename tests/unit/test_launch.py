"""Launching a CUDA C++ kernel, down to what the driver is handed, on a double of the driver."""

from __future__ import annotations

import ctypes
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nf.kernels import load
from nf.kernels.compile import Artifact
from nf.kernels.device import CudaError, DeviceMemoryError
from nf.kernels.source import KernelSource

SOURCE = KernelSource(
    name="k",
    language="cuda",
    files=(),
    parameters=("pointer", "int32", "pointer", "float32", "int64", "int32", 2, "int32"),
    entry="k",
)


class Pair(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint64), ("second", ctypes.c_uint64))

    @property
    def value(self) -> bytes:
        assert ctypes.addressof(self) % 8 == 0
        return struct.pack("2Q", self.first, self.second)


TYPES = (
    ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_float, ctypes.c_int64, ctypes.c_int32, Pair,
    ctypes.c_int32,
)  # fmt: skip
KERNEL = 77


class Config(ctypes.Structure):
    """CUlaunchConfig as cuda.h declares it."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(ctypes.c_int * 18)),
        ("num_attributes", ctypes.c_uint),
    )


class Status(int):
    name = "CUDA_ERROR_NOT_FOUND"


class Driver:
    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.loads = 0
        self.loaded: list[int] = []  # libraries
        self.status = 0
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 4)(self._launch)

    def load(self, *_: Any) -> Any:
        self.loads += 1
        self.loaded.append(self.loads)
        return 0, self.loads

    def unload(self, library: int) -> Any:
        self.loaded.remove(library)
        return (0,)

    def _launch(self, at: int, kernel: int, arguments_at: int, extra: int | None) -> int:
        assert (kernel, extra) == (KERNEL, None)
        config = Config.from_address(at)
        arguments = (ctypes.c_void_p * len(TYPES)).from_address(arguments_at)
        attributes = [tuple(config.attributes[0][:3:2])] if config.num_attributes else []
        self.launches.append(
            {
                "grid": tuple(config.grid),
                "block": tuple(config.block),
                "shared": config.shared_bytes,
                "stream": config.stream,
                "attributes": attributes,
                "values": tuple(kind.from_address(arguments[i]).value for i, kind in enumerate(TYPES)),
            }
        )
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    double = Driver()
    bindings = ModuleType("cuda.bindings")
    bindings.driver = SimpleNamespace(  # type: ignore[attr-defined]
        cuLibraryLoadFromFile=double.load,
        cuLibraryUnload=double.unload,
        cuMemGetInfo=lambda: (0, 1 << 29, 16 << 30),
        cuLibraryGetKernel=lambda _library, entry: (0, KERNEL) if entry == b"k" else (Status(500), None),
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(load, "_driver", lambda: double)
    return double


def test_the_driver_gets_each_launch_as_it_was_asked_for(driver: Driver) -> None:
    kernel = load.CudaKernel(Artifact(SOURCE, Path("k.cubin"), ()), shared_bytes=1000)
    high = 0xFFFF_8000_1234_5678
    one, other = struct.pack("2Q", high, 2), struct.pack("2Q", 3, high)
    calls = [
        ((high, -1, 16, 0.5, -(1 << 40), 7, one, 8), 132, 128, 0x7F00_0000_0010, False),
        ((1, 2, 3, 1.0, 4, 5, one, 9), 132, 128, 0x7F00_0000_0010, False),
        ((1, 2, 3, 1.0, 4, 5, one, 9), 132, 128, 0x7F00_0000_0010, True),
        ((1, 2, 3, 1.0, 4, 6, other, 9), 1, 1024, 8, True),
        ((1, 2, 3, 1.0, 4, 6, other, 9), 1, 1024, 8, False),
    ]
    for values, grid, block, stream, pdl in calls:
        kernel.launch(*values, grid=grid, block=block, stream=stream, pdl=pdl)
    assert driver.launches == [
        {
            "grid": (grid, 1, 1),
            "block": (block, 1, 1),
            "shared": 1000,
            "stream": stream,
            "attributes": [(6, 1)] if pdl else [],  # programmatic stream serialization
            "values": values,
        }
        for values, grid, block, stream, pdl in calls
    ]


def test_a_refused_launch_says_so(driver: Driver) -> None:
    kernel = load.CudaKernel(Artifact(SOURCE, Path("k.cubin"), ()))
    driver.status = 700
    with pytest.raises(load.LaunchError, match=r"^k: launching it failed with CUDA error 700$"):
        kernel.launch(1, 2, 3, 4.0, 5, 6, bytes(16), 7, grid=1, block=32, stream=0)
    driver.status = 2
    with pytest.raises(DeviceMemoryError, match=r"^k: launching it needs .*: 0\.50 of 16\.00 GiB are free$"):
        kernel.launch(1, 2, 3, 4.0, 5, 6, bytes(16), 7, grid=1, block=32, stream=0)


def test_what_a_loader_has_loaded_is_unloaded_with_it(driver: Driver) -> None:
    other = replace(SOURCE, name="other")
    missing = replace(SOURCE, name="missing", entry="missing")
    artifacts = [Artifact(source, Path(source.name), ()) for source in (SOURCE, other, missing)]
    first, second = load.KernelLoader(artifacts), load.KernelLoader(artifacts)
    for loader in (first, second):
        assert loader.cuda("k", shared_bytes=64).shared_bytes == 64
        assert loader.cuda("other").name == "other"
    assert driver.loaded == [1, 2, 3, 4]
    with pytest.raises(CudaError, match="CUDA_ERROR_NOT_FOUND"):
        first.cuda("missing")
    assert driver.loaded == [1, 2, 3, 4]
    first.free()
    first.free()
    assert driver.loaded == [3, 4]
    second.free()
    assert driver.loaded == []


def test_a_launcher_is_loaded_once_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has room for one kernel: a second loading would put another there, under those who launch the first."""
    refusals, calls = [0, 209], []

    class Library:
        def __getitem__(self, name: str) -> Any:
            def call(arguments: Any) -> None:
                calls.append(name)
                if name.endswith("load_to_device"):
                    assert ctypes.c_int32.from_address(arguments[1]).value == 3
                    ctypes.c_int32.from_address(arguments[2]).value = refusals.pop()

            return call

    monkeypatch.setattr(load, "_load_runtime", lambda: None)
    monkeypatch.setattr(load, "_current_device", lambda: 3)
    monkeypatch.setattr(load.ctypes, "CDLL", lambda _path: Library())
    load._loaded_launcher.cache_clear()
    with pytest.raises(load.LaunchError, match=r"^product: loading it failed with CUDA error 209$"):
        load._launcher(Path("product.so"))
    found = load._launcher(Path("product.so"))
    assert load._launcher(Path("product.so")) is found
    assert calls == ["_mlir_nf_kernel_cuda_init", "_mlir_nf_kernel_cuda_load_to_device"] * 2
    load._loaded_launcher.cache_clear()
