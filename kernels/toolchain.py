"""The two compilers: CuTe DSL → shared library with a host launcher, CUDA C++ → cubin through NVRTC."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nf.kernels.source import HERE, LAUNCHER, KernelSource


def compile_source(source: KernelSource, arch: str) -> bytes:
    """Compile one kernel for ``arch``; returns the bytes of a .so ("cute") or a cubin ("cuda")."""
    return _compile_cute(source, arch) if source.language == "cute" else _compile_cuda(source, arch)


def _compile_cuda(source: KernelSource, arch: str) -> bytes:
    from cuda.core import Program, ProgramOptions
    from cuda.pathfinder import find_nvidia_header_directory

    include = find_nvidia_header_directory("cudart")
    if include is None:
        raise RuntimeError("the CUDA headers are missing; install nvidia-cuda-runtime")
    options = ProgramOptions(
        name=source.files[0],
        arch=arch,
        std="c++17",
        include_path=[include, str(HERE)],
        define_macro=list(source.definitions.items()) or None,  # it refuses an empty list
    )
    code = Program((HERE / source.files[0]).read_text(), "c++", options).compile("cubin").code
    assert isinstance(code, bytes)
    return code


def find_linker() -> list[str] | None:
    """Command of the C compiler that links launchers: ``$CC``, else cc or gcc; None if it is not there."""
    try:
        own = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # an open quotation
        return None
    for command in [own] if own else [["cc"], ["gcc"]]:
        if shutil.which(command[0]):
            return command
    return None


def _compile_cute(source: KernelSource, arch: str) -> bytes:
    linker = find_linker()
    if linker is None:
        raise RuntimeError("linking a kernel's launcher needs a C compiler; install gcc or set CC")
    library = _dsl_library()
    import cutlass.cute as cute

    function, arguments = source.build()
    compiled: Any = cute.compile(function, *arguments, options=f"--gpu-arch {arch}")
    with tempfile.TemporaryDirectory() as scratch:
        compiled.export_to_c(scratch, "kernel", function_prefix=LAUNCHER)
        out = Path(scratch, "kernel.so")
        runtime = library / "libcuda_dialect_runtime_static.a"
        command = [*linker, "-shared", "-o", str(out), f"{scratch}/kernel.o", str(runtime)]
        command.append("-Wl,-Bsymbolic,--gc-sections")
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"{linker[0]} cannot link its launcher: {said[-1]}")
        return out.read_bytes()


@functools.cache
def _dsl_library() -> Path:
    """Make the DSL importable and return the folder of its native libraries.

    Its packages stand in a folder of their own, which only NVIDIA's metapackage puts on the path (and that one brings
    the CUDA 12 libraries along). Its runtime must be loaded globally before an export where there is no libcuda.
    """
    import nvidia_cutlass_dsl

    home = Path(next(iter(nvidia_cutlass_dsl.__path__)))
    packages = str(home / "dsl_packages")
    if packages not in sys.path:
        sys.path.append(packages)
    library = home / "cu13" / "lib"
    ctypes.CDLL(str(library / "libcute_dsl_runtime.so"), mode=ctypes.RTLD_GLOBAL)
    return library
