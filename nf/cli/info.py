"""`nf info`: versions, devices, the executor that would run a model and why, and where things are kept."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "minijinja", "tqdm", "huggingface_hub")
_CUDA_PACKAGES = ("cuda-python", "cuda-bindings", "cuda-core", "cupy-cuda13x", "nvidia-cutlass-dsl")

_EPILOG = """\
examples:
  nf info
  nf info --json | jq .executor
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="versions, devices, and what would be used to run a model",
        description="Say what nf finds on this machine, and which executor would run a model, and why.",
        epilog=_EPILOG,
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        import json

        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_lines(found)))
    return 0


def collect() -> dict[str, Any]:
    """Everything `nf info` tells, as plain data; sizes in bytes."""
    from nf.kernels.compile import cache_dir

    gpus, no_gpu = gpu_devices()
    return {
        "versions": {
            "nf": _version("nf"),
            "python": platform.python_version(),
            **{name: _version(name) for name in (*_PACKAGES, *_CUDA_PACKAGES)},
        },
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "cores": _cpu_cores(), "memory": _cpu_memory(), "blas": _blas()},
        "gpus": gpus,
        "executor": _executor(gpus, no_gpu),
        "cache_dir": str(cache_dir()),
        "bundled_model": _bundled_model(),
    }


def gpu_devices() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs cuda-python sees, and if there are none, why not in a few words."""
    try:
        driver: Any = import_module("cuda.bindings.driver")
    except ImportError:
        return [], "cuda-python is not installed (pip install 'nf[cuda]')"
    try:
        _call(driver.cuInit, 0)
        devices = [_call(driver.cuDeviceGet, i) for i in range(_call(driver.cuDeviceGetCount))]
        cuda = _call(driver.cuDriverGetVersion)
        found = [_gpu(driver, device, cuda) for device in devices]
    except Exception as error:  # no driver library, no device, a driver too old: each has its own type
        return [], f"the CUDA driver cannot be used ({str(error).partition('. ')[0]})"
    return found, None if found else "the CUDA driver shows no device"


def _gpu(driver: Any, device: Any, cuda: int) -> dict[str, Any]:
    attribute = driver.CUdevice_attribute

    def get(name: str) -> int:
        return int(_call(driver.cuDeviceGetAttribute, getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    return {
        "name": _call(driver.cuDeviceGetName, 256, device).rstrip(b"\0").decode(),
        "compute_capability": f"{get('COMPUTE_CAPABILITY_MAJOR')}.{get('COMPUTE_CAPABILITY_MINOR')}",
        "sms": get("MULTIPROCESSOR_COUNT"),
        "memory": int(_call(driver.cuDeviceTotalMem, device)),
        "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
    }


def _call(function: Any, *args: Any) -> Any:
    """A driver call: its result, or RuntimeError with the error's name."""
    error, *result = function(*args)
    if int(error) != 0:
        raise RuntimeError(getattr(error, "name", str(error)))
    return result[0] if result else None


def _executor(gpus: list[dict[str, Any]], no_gpu: str | None) -> dict[str, str]:
    """What `--device auto` comes to here."""
    if gpus:
        return {"name": "cpu", "reason": f"{gpus[0]['name']} is there, but this version of nf has no GPU executor yet"}
    return {"name": "cpu", "reason": f"no GPU: {no_gpu}"}


def _bundled_model() -> dict[str, Any] | None:
    from nf.hub import BUNDLED_DIR, BUNDLED_MODEL

    if not (BUNDLED_DIR / "config.json").is_file():
        return None
    size = sum(file.stat().st_size for file in BUNDLED_DIR.iterdir())
    return {"name": BUNDLED_MODEL, "path": str(BUNDLED_DIR), "size": size}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _blas() -> str:
    """The library behind NumPy's matrix products, which decides the CPU executor's speed."""
    import numpy

    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[call-overload,unused-ignore]
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _lines(found: dict[str, Any]) -> list[str]:
    versions = dict(found["versions"])
    cpu = found["cpu"]
    rows = [
        ("nf", versions.pop("nf") or "not installed"),
        ("python", f"{versions.pop('python')}, {sys.executable}"),
        ("system", found["platform"]),
        ("packages", ", ".join(f"{name} {v}" for name, v in versions.items() if v)),
        ("not installed", ", ".join(name for name, v in versions.items() if not v)),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {_size(cpu['memory'])}, BLAS {cpu['blas']}"),
    ]
    rows += [(f"GPU {i}", _gpu_line(gpu)) for i, gpu in enumerate(found["gpus"])]
    model = found["bundled_model"]
    rows += [
        ("executor", f"{found['executor']['name']}: {found['executor']['reason']}"),
        ("cache", found["cache_dir"]),
        ("bundled model", f"{model['name']}, {_size(model['size'])}, {model['path']}" if model else "missing"),
    ]
    return [_row(name, text) for name, text in rows if text]


def _gpu_line(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['sms']} SMs, "
        f"{_size(gpu['memory'])}, driver for CUDA {gpu['driver_cuda']}"
    )


def _row(name: str, text: str) -> str:
    import textwrap

    wrapper = textwrap.TextWrapper(
        width=100,
        initial_indent=f"{name:<14}",
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(text)


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"
