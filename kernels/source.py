"""KernelSource: what there is to compile, as data. Nothing here needs a compiler or a GPU."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ParameterKind = Literal["pointer", "int32", "int64", "float32"] | int
"""Of a launch argument; a number: a struct of so many pointers, given as its bytes."""

LAUNCHER = "nf_kernel"  # symbol prefix inside every shared library; each is opened with its symbols to itself
HERE = Path(__file__).resolve().parent
TOOLCHAIN = HERE / "toolchain.py"


@dataclass(frozen=True, slots=True)
class KernelSource:
    """One kernel in one configuration.

    Args:
        name: unique and fit for a file name, e.g. ``gemm_128x256_2x1x1_swiglu_bfloat16``.
        language: "cute" (CuTe DSL: ``factory`` names a Python function) or "cuda" (C++: ``entry`` names a kernel).
        files: source files, relative to this folder, whose bytes decide whether a compiled artifact is still right; for
            "cuda" the first one is compiled.
        parameters: kinds of the launch arguments; a CuTe launcher takes the stream as a last argument of its own.
        factory: "module:function" of a function (configuration → (jit function, example arguments)), "cute" only.
        entry: name of the ``extern "C"`` kernel, "cuda" only.
        config: handed to the factory, or turned into -D definitions.
    """

    name: str
    language: Literal["cute", "cuda"]
    files: tuple[str, ...]
    parameters: tuple[ParameterKind, ...]
    factory: str = ""
    entry: str = ""
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def definitions(self) -> dict[str, str]:
        """Preprocessor definitions of a "cuda" source."""
        return {name: str(int(value) if isinstance(value, bool) else value) for name, value in self.config}

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """The jit function and example arguments of a "cute" source. Imports the DSL."""
        module, function = self.factory.split(":")
        made = getattr(importlib.import_module(module), function)(**dict(self.config))
        assert isinstance(made, tuple)
        return made

    def digest(self, arch: str) -> str:
        """Fingerprint of what is compiled and how: this declaration, the target, the source files' bytes."""
        state = hashlib.sha256(repr((self, arch)).encode())
        state.update(TOOLCHAIN.read_bytes())
        for file in self.files:
            state.update((HERE / file).read_bytes())
        return state.hexdigest()
