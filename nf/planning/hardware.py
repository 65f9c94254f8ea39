"""What accelerators can do: the table of NanoFlow's Table 1 as data, figures measured here, and the current GPU.

Nothing here needs a GPU; ``current_gpu`` asks the driver where there is one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

from nf.errors import InputError, shown

GB, TB = 1e9, 1e12  # bytes
TFLOPS = 1e12  # FLOP/s


@dataclass(frozen=True, slots=True)
class Power:
    """Energy of work at steady state, as measured on one card.

    The two costs are all-in: joules drawn by the whole card while it does nothing else, static share included.
    """

    joules_per_flop: float  # of a 16-bit GEMM, its memory traffic included
    joules_per_byte: float  # of reading device memory
    static_watts: float  # drawn by an idle card
    cap_watts: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What kernels were measured to reach; None where nobody did."""

    compute: float | None = None  # 16-bit GEMM, FLOP/s
    memory_bandwidth: float | None = None  # bytes/s
    network_bandwidth: float | None = None  # all-reduce, one way, bytes/s
    power: Power | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator by its data sheet.

    Args:
        network_bandwidth: to the other accelerators of the host, **one way** (data sheets and NanoFlow's Table 1 name
            the sum of both ways); None where it is not known.
        compute: dense 16-bit matrix arithmetic.
        driver_name: what the CUDA driver calls it.
    """

    name: str
    label: str
    memory: float  # bytes
    memory_bandwidth: float  # bytes/s
    network_bandwidth: float | None  # bytes/s
    compute: float  # FLOP/s
    driver_name: str | None = None
    measured: Measured = Measured()


H200_POWER = Power(joules_per_flop=0.974e-12, joules_per_byte=0.13e-9, static_watts=126.0, cap_watts=700.0)
"""Measured on one H200 SXM: 0.87 J for 893 GFLOP of bfloat16 GEMMs, and 0.13 to 0.145 nJ per byte read, of which
the least stands here: it goes into a bound."""

_CUTLASS = Measured(compute=280 * TFLOPS, source="CUTLASS GEMM, as NanoFlow reports it")
_H200 = Measured(
    compute=666 * TFLOPS,
    memory_bandwidth=4.6 * TB,
    network_bandwidth=288 * GB,
    power=H200_POWER,
    source="one H200 SXM at its power cap; NCCL all-reduce of 33.5 MB on four",
)


def _accelerator(
    name: str,
    label: str,
    memory_gb: float,
    memory_gb_s: float,
    network_gb_s: float,
    tflops: float,
    driver_name: str | None = None,
    measured: Measured = Measured(),
) -> Accelerator:
    """One line of Table 1, whose network bandwidth counts both ways."""
    return Accelerator(
        name,
        label,
        memory_gb * GB,
        memory_gb_s * GB,
        network_gb_s / 2 * GB,
        tflops * TFLOPS,
        driver_name,
        measured,
    )


ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        accelerator.name: accelerator
        for accelerator in (
            _accelerator("v100", "V100", 16, 900, 300, 125, "Tesla V100-SXM2-16GB"),
            _accelerator("a100-40gb", "A100 40 GB", 40, 1555, 600, 312, "NVIDIA A100-SXM4-40GB", _CUTLASS),
            _accelerator("a100-80gb", "A100 80 GB", 80, 2000, 600, 312, "NVIDIA A100-SXM4-80GB", _CUTLASS),
            _accelerator("h100", "H100", 80, 3352, 900, 989, "NVIDIA H100 80GB HBM3"),
            _accelerator("h200", "H200", 141, 4800, 900, 989, "NVIDIA H200", _H200),
            _accelerator("b100", "B100", 192, 8000, 1800, 1800),
            _accelerator("b200", "B200", 192, 8000, 1800, 2250, "NVIDIA B200"),
            _accelerator("mi250", "MI250", 128, 3352, 800, 362),
            _accelerator("mi300", "MI300", 192, 5300, 1024, 1307),
            _accelerator("mi325x", "MI325X", 256, 6000, 1024, 1307),
            _accelerator("gaudi2", "Gaudi 2", 96, 2400, 600, 1000),
            _accelerator("gaudi3", "Gaudi 3", 128, 3700, 1200, 1800),
            _accelerator("ada6000", "Ada 6000 (PCIe)", 48, 960, 64, 182, "NVIDIA RTX 6000 Ada Generation"),
        )
    }
)
"""By name; NanoFlow's Table 1, in its order."""

FLOPS_PER_SM_CLOCK: Mapping[tuple[int, int], int] = MappingProxyType(
    {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}
)
"""Dense 16-bit tensor-core FLOPs of one SM per clock, by compute capability."""


def accelerator(name: str, *, field: str = "--gpu") -> Accelerator:
    """The accelerator of that name, or with ``auto`` the one in this machine.

    Raises:
        InputError: there is none of that name, or ``auto`` finds no GPU; names those that there are.
    """
    if name == "auto":
        return current_gpu(field=field)
    found = ACCELERATORS.get(name.lower())
    if found is None:
        begin = [known for known in ACCELERATORS if name and known.startswith(name.lower())]
        near = begin or difflib.get_close_matches(name.lower(), ACCELERATORS, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(field, f"must be auto or one of {', '.join(ACCELERATORS)}, not {shown(name)}{hint}")
    return found


def current_gpu(*, field: str = "--gpu") -> Accelerator:
    """This machine's first GPU: the table's line if it is one of those, otherwise what the driver's attributes say.

    The memory is what the driver shows, which is less than the data sheet's. Compute of a GPU outside the table is
    SMs × clock × FLOPS_PER_SM_CLOCK, and its network is not known.

    Raises:
        InputError: there is no GPU, no driver, or no cuda-python.
    """
    try:
        driver: Any = import_module("cuda.bindings.driver")
    except ImportError:
        raise _no_gpu(field, "cuda-python is not installed") from None
    try:
        _call(driver.cuInit, 0)
        return _read(driver, _call(driver.cuDeviceGet, 0))
    except _DriverError as error:
        raise _no_gpu(field, str(error)) from error
    except Exception as error:  # the driver's library is not there; cuda-python's error for that has moved before
        raise _no_gpu(field, "the CUDA driver cannot be loaded") from error


def _read(driver: Any, device: Any) -> Accelerator:
    name = _call(driver.cuDeviceGetName, 256, device).partition(b"\0")[0].decode()
    memory = float(_call(driver.cuDeviceTotalMem, device))
    for known in ACCELERATORS.values():
        if known.driver_name == name:
            return replace(known, memory=memory)

    def get(attribute: str) -> int:
        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")
        return int(_call(driver.cuDeviceGetAttribute, kind, device))

    capability = get("COMPUTE_CAPABILITY_MAJOR"), get("COMPUTE_CAPABILITY_MINOR")
    if capability not in FLOPS_PER_SM_CLOCK:
        raise _DriverError(f"how fast {name} computes is not known")
    return Accelerator(
        name=name,
        label=name,
        memory=memory,
        memory_bandwidth=2 * get("MEMORY_CLOCK_RATE") * 1e3 * get("GLOBAL_MEMORY_BUS_WIDTH") / 8,  # two per clock
        network_bandwidth=None,
        compute=get("MULTIPROCESSOR_COUNT") * get("CLOCK_RATE") * 1e3 * FLOPS_PER_SM_CLOCK[capability],
        driver_name=name,
    )


class _DriverError(Exception):
    """The driver answers, but not with a GPU that can be planned for."""


def _no_gpu(field: str, reason: str) -> InputError:
    return InputError(field, f"no GPU can be read here ({reason}); name one of {', '.join(ACCELERATORS)}")


def _call(function: Any, *args: Any) -> Any:
    """A driver call: its result, or _DriverError with the error's name."""
    error, *result = function(*args)
    if int(error) != 0:
        raise _DriverError(getattr(error, "name", str(error)))
    return result[0] if result else None
