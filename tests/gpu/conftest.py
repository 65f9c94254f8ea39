"""Tests of this folder need a CUDA device, PyTorch as the reference, and a compiled bundle or the compilers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest


def _has_gpu() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _has_gpu():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)
