"""A GPU, and a profile, as far as ``nf plan`` sees them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_profile import KEY, SMS, formula_profile
from plan_cli_cases import StepBench

from nf.cli import plan_search
from nf.planning import gpu_bench, gpu_step_bench
from nf.planning.hardware import ACCELERATORS
from nf.planning.profile_file import save_profile


@pytest.fixture
def profile(tmp_path: Path) -> str:
    return str(save_profile(tmp_path, formula_profile()))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU as far as the command sees it; returns the folder of the cache."""
    device = SimpleNamespace(sms=SMS, name="NVIDIA H200", memory=lambda: (130 << 30, 140 << 30))
    monkeypatch.setattr(plan_search, "the_gpu", lambda _: device)
    monkeypatch.setattr(plan_search, "measured_profile", lambda *_, **__: (formula_profile(), None, None))
    monkeypatch.setattr(gpu_bench, "profile_key", lambda _: KEY)
    monkeypatch.setattr(gpu_step_bench, "GpuStepBench", StepBench)
    monkeypatch.setattr("nf.planning.hardware.current_gpu", lambda **_: ACCELERATORS["h200"])
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
