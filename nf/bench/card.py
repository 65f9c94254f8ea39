"""The GPUs' own counters through NVML: energy, clock, power cap, memory. NaN or None where a machine does not tell.

NVML and CUDA number devices differently, so each is found by its PCI address, which the driver is asked for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

_ADDRESS_CHARS = 32


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def energy(ordinal: int | None = None) -> float:
    """Joules a GPU has used since the driver was loaded; None is the one in use, else the first."""
    millijoules = ctypes.c_ulonglong()
    return millijoules.value / 1e3 if _ask("nvmlDeviceGetTotalEnergyConsumption", ordinal, millijoules) else _NAN


def power_cap(ordinal: int | None = None) -> float:
    """Watts the GPU may draw."""
    milliwatts = ctypes.c_uint()
    return milliwatts.value / 1e3 if _ask("nvmlDeviceGetEnforcedPowerLimit", ordinal, milliwatts) else _NAN


def sm_clock(ordinal: int | None = None) -> float:
    """MHz that the SMs run at now."""
    megahertz = ctypes.c_uint()
    return float(megahertz.value) if _ask("nvmlDeviceGetClockInfo", ordinal, megahertz, _SM_CLOCK) else _NAN


def memory_used(ordinal: int | None = None) -> int | None:
    """Bytes of the GPU's memory in use, by all processes."""
    memory = _Memory()
    return int(memory.used) if _ask("nvmlDeviceGetMemoryInfo", ordinal, memory) else None


def driver_version() -> str | None:
    """E.g. "580.159.03"."""
    nvml, text = _nvml(), ctypes.create_string_buffer(80)
    if nvml is None or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return None
    return text.value.decode()


_NAN = float("nan")
_SM_CLOCK = 1  # NVML_CLOCK_SM


def _ask(function: str, ordinal: int | None, result: ctypes._SimpleCData[Any] | ctypes.Structure, *of: int) -> bool:
    """Whether NVML has filled in ``result`` about a device, or about something of it."""
    nvml, device = _nvml(), _handle(_current() if ordinal is None else ordinal)
    return nvml is not None and device is not None and not getattr(nvml, function)(device, *of, ctypes.byref(result))


@functools.cache
def _nvml() -> Any:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if nvml.nvmlInit_v2() else nvml


@functools.cache
def _handle(ordinal: int) -> ctypes.c_void_p | None:
    """NVML's handle of the device that CUDA calls ``ordinal``."""
    nvml, device = _nvml(), ctypes.c_void_p()
    address = _driver(lambda driver: driver.cuDeviceGetPCIBusId(_ADDRESS_CHARS, driver.cuDeviceGet(ordinal)[1]))
    if nvml is None or address is None:
        return None
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(address.partition(b"\0")[0], ctypes.byref(device)):
        return None
    return device


def _current() -> int:
    """The device of the calling thread's context; the first one if there is none."""
    device = _driver(lambda driver: driver.cuCtxGetDevice())
    return 0 if device is None else int(device)


def _driver(call: Callable[[Any], tuple[Any, Any]]) -> Any:
    """Result of a driver call; None if it fails or there is no driver."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    try:
        driver.cuInit(0)
        error, result = call(driver)
    except RuntimeError:  # no driver library
        return None
    return None if int(error) else result
