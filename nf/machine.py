"""What nf finds on this machine: versions, CPU, GPUs. Told by `nf info` and by every benchmark's record."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "minijinja", "tqdm", "huggingface_hub", "highspy")
CUDA_PACKAGES = (
    "cuda-bindings", "nvidia-cuda-runtime", "cuda-core", "nvidia-cuda-nvrtc", "nvidia-cutlass-dsl-libs-base",
    "cupy-cuda13x",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Everything as plain data; sizes in bytes, None for a package that is not installed."""
    from nf import __version__
    from nf.device_choice import gpu_devices

    gpus, _ = gpu_devices()
    return {
        "versions": {
            "nf": __version__,
            "python": platform.python_version(),
            **{name: package_version(name) for name in (*PACKAGES, *CUDA_PACKAGES)},
        },
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "cores": cpu_cores(), "memory": _cpu_memory(), "blas": _blas()},
        "gpus": gpus,
    }


@functools.cache
def package_version(package: str) -> str | None:
    """What is installed of a package; None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _blas() -> str:
    """The library behind NumPy's matrix products, which decides the CPU executor's speed."""
    import numpy

    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[call-overload,unused-ignore]
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
