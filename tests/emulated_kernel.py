"""CUDA C++ kernels on a CPU: their sources are compiled as C++, and tests/emulation/ takes the GPU's place.

Sources are taken as they are but for hopper.cuh and memory.cuh, which hold all of their PTX and have a double each.
What is emulated is the order of events in a CTA; CTAs run one after the other. Floating point is the CPU's, so results
may differ in the last bits. Needs a C++ compiler, ``$CXX`` or c++.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from nf.kernels.load import Value
from nf.kernels.source import HERE as KERNELS
from nf.kernels.source import KernelSource, ParameterKind

EMULATION = Path(__file__).parent / "emulation"
FLAGS = (
    *("-std=c++20", "-O2", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0"),  # it takes jumps between stacks for errors
    *(f"-I{EMULATION}", "-include", "hopper.cuh"),  # with what CUDA has without an include
)
TYPES = {
    "pointer": ("void*", ctypes.c_void_p),
    "int32": ("int", ctypes.c_int32),
    "int64": ("long long", ctypes.c_int64),
    "float32": ("float", ctypes.c_float),
}
"""Of a launch argument, in C++ and here."""
POINTERS = "template <int N> struct Pointers { void* values[N]; };"

SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
IN_PLACE = r"\1* const \2 = reinterpret_cast<\1*>(shared_memory_bytes);"


class Copies(IntEnum):
    """When copies in the background are done."""

    AT_ONCE = 0
    LATE = 1
    BY_CHANCE = 2


class EmulatedKernel:
    """A "cuda" source, compiled for the CPU into ``folder``, ``without`` some of its text: to see it fail."""

    def __init__(self, source: KernelSource, folder: Path, *, without: str = "") -> None:
        self._kinds = source.parameters
        home = folder / source.name
        home.mkdir()
        for file in source.files:
            if not (EMULATION / file).exists():  # found there otherwise
                text = SHARED.sub(IN_PLACE, (KERNELS / file).read_text())
                (home / file).write_text(text.replace(without, "") if without else text)
        (home / "launch.cpp").write_text(self._launcher(source.entry))
        library = home / "kernel.so"
        defines = [f"-D{name}={value}" for name, value in source.definitions.items()]
        sources = ["-x", "c++", home / source.files[0], home / "launch.cpp", EMULATION / "emulator.cpp"]
        subprocess.run(
            [os.environ.get("CXX", "c++"), *FLAGS, *defines, *sources, "-o", library],
            check=True,
            timeout=300,
        )
        self._library = ctypes.CDLL(str(library))
        self._library.emulate.restype = ctypes.c_char_p  # why it failed

    def _launcher(self, entry: str) -> str:
        types = [f"Pointers<{kind}>" if isinstance(kind, int) else TYPES[kind][0] for kind in self._kinds]
        values = ", ".join(f"*static_cast<{name}*>(values[{i}])" for i, name in enumerate(types))
        declared = f'extern "C" void {entry}({", ".join(types)});'
        return f'{POINTERS}\n{declared}\nextern "C" void enter(void** values) {{ {entry}({values}); }}\n'

    def launch(
        self,
        *values: Value,
        grid: int,
        block: int,
        shared_bytes: int,
        readable: Sequence[Any],
        seed: int,
        constant: Sequence[Any] = (),
        copies: Copies = Copies.BY_CHANCE,
    ) -> None:
        """Run ``grid`` CTAs of ``block`` threads with one value per parameter.

        Args:
            shared_bytes: of dynamic shared memory.
            readable: arrays, contiguous, that bulk copies and wide loads may read.
            constant: the same, and the kernel before does not write them.
            seed: of the order in which threads take turns.

        Raises:
            AssertionError: the kernel hangs, reads elsewhere or ends before its copies do.
        """
        cells = [_cell(kind, value) for kind, value in zip(self._kinds, values, strict=True)]
        arrays = (*constant, *readable)
        begins = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
        sizes = (ctypes.c_long * len(arrays))(*(array.nbytes for array in arrays))
        failure = self._library.emulate(
            self._library.enter, (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells)),
            grid, block, shared_bytes, copies, seed, len(arrays), len(constant), begins, sizes,
        )  # fmt: skip
        assert failure is None, failure.decode()


def _cell(kind: ParameterKind, value: Value) -> Any:
    """Memory with a value of this kind."""
    if isinstance(value, bytes):
        return (ctypes.c_char * len(value)).from_buffer_copy(value)
    assert isinstance(kind, str)
    return TYPES[kind][1](value)


class EmulatedLoader:
    """In place of a KernelLoader: what is loaded is emulated, with ``options`` of ``EmulatedKernel.launch``."""

    def __init__(self, kernels: Mapping[str, EmulatedKernel], **options: Any) -> None:
        self._kernels, self._options = kernels, options

    def cuda(self, name: str, *, shared_bytes: int = 0) -> Any:
        def launch(*values: Value, grid: int, block: int, **_on: Any) -> None:
            self._kernels[name].launch(*values, grid=grid, block=block, shared_bytes=shared_bytes, **self._options)

        return SimpleNamespace(launch=launch)


def aligned(array: Any) -> Any:
    """A copy at an address such as device memory has."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def int32(values: Any) -> Any:
    return aligned(np.asarray(values, np.int32))


def normal(rng: np.random.Generator, *shape: int) -> Any:
    """Normal random numbers as bf16."""
    return aligned(rng.standard_normal(shape, np.float32).astype(bfloat16))


def pointer(array: Any) -> int:
    return int(array.ctypes.data)
