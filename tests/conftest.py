"""What holds for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


@pytest.fixture(autouse=True)
def _auto_is_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside tests/gpu, device="auto" comes to the CPU on every machine, here and in processes that tests start."""
    if GPU_TESTS not in request.path.parents:
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
