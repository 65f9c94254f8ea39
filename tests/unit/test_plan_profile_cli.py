"""``nf plan profile`` and the drawings of ``nf plan show``, with formulas in place of a GPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_profile import KEY, MODEL, SMS, FormulaBench
from plan_cli_cases import nf

from nf.cli import plan_profile
from nf.errors import InputError, NfError
from nf.graphs.plan_store import shape_name
from nf.planning import gpu_bench, profiling
from nf.planning.profile_file import read_profile

QUICK = profiling.quick_extent(2048, SMS)
SOLOS = len(profiling.wanted_solos(MODEL.operations, QUICK))
PAIRS = len(profiling.wanted_pairs(MODEL.operations, QUICK))
POINTS = SOLOS + PAIRS


class ProfileBench(FormulaBench):
    def __init__(self, *_: Any) -> None:
        super().__init__()

    def close(self) -> None:
        pass


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU as far as ``nf plan profile`` sees it; returns the folder of profiles in the cache."""
    monkeypatch.setattr(plan_profile, "the_gpu", lambda _: SimpleNamespace(sms=SMS, name="NVIDIA H200"))
    monkeypatch.setattr(gpu_bench, "profile_key", lambda _: KEY)
    monkeypatch.setattr(gpu_bench, "GpuBench", ProfileBench)
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "profiles"


def test_what_is_left_of_a_profile_is_what_is_still_open(
    profiles: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(bench: ProfileBench, point: Any) -> None:
        FormulaBench._count(bench, point)
        if "16" in str(point):
            raise NfError("no such partition")

    monkeypatch.setattr(ProfileBench, "_count", refuse)
    assert nf("profile", "llama-3-8b", "--quick") == 0
    out, err = capsys.readouterr()
    stored = read_profile(profiles / KEY.file_name, shape_name(MODEL.config))
    measured = len(stored.solos) + len(stored.co_runs)
    assert f"{measured} points measured, {POINTS - measured} could not be, 0 known before\n" in out
    assert 0 < measured < POINTS
    assert f"{POINTS} of {POINTS} points" in err
    assert nf("profile", "llama-3-8b", "--quick", "-q") == 0
    assert f"0 points measured, {POINTS - measured} could not be, {measured} known before\n" in capsys.readouterr().out

    now, took = [0.0], ProfileBench._count

    def long(bench: ProfileBench, point: Any) -> None:
        now[0] += 1.0
        took(bench, point)

    monkeypatch.setattr(ProfileBench, "_count", long)
    monkeypatch.setattr(profiling, "monotonic", lambda: now[0])
    (profiles / KEY.file_name).unlink()
    assert nf("profile", "llama-3-8b", "--quick", "-q", "--seconds", "150") == 0
    assert f" could not be, 0 known before; {POINTS - 150} left: run it again to go on\n" in capsys.readouterr().out


def test_profiles_are_kept_where_they_are_wanted(
    profiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "some" / "where"
    argv = ("profile", "llama-3-8b", "--quick", "-q", "--profiles-dir", str(folder))
    assert nf(*argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{POINTS} points measured, 0 known before",
        str(folder / KEY.file_name),
    ]
    kept = read_profile(folder / KEY.file_name, shape_name(MODEL.config))
    assert len(kept.solos) == SOLOS
    assert len(kept.trend["gate_up_proj", 112]) == 2048 // 128
    assert not profiles.exists()
    assert nf(*argv) == 0
    assert f"0 points measured, {POINTS} known before" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^--profiles-dir: .* cannot be a folder: File exists"):
        nf(*argv[:-1], str(folder / KEY.file_name))


def test_the_limits_that_hold_where_none_is_given_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        nf("profile", "--help")
    told = " ".join(capsys.readouterr().out.split())
    assert f"(default {profiling.FULL_SECONDS:g}; {profiling.QUICK_SECONDS:g} with --quick)" in told


def test_a_profile_that_is_ended_is_kept_and_gone_on_with(
    profiles: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ended(ProfileBench):
        """SIGTERM comes while the 30th point is measured; nothing is saved before."""

        def _count(self, point: Any) -> None:
            super()._count(point)
            if len(self.measured) == 30:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(gpu_bench, "GpuBench", Ended)
    monkeypatch.setattr(profiling, "SAVE_SECONDS", 1e9)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        nf("profile", "llama-3-8b", "--quick", "-q")
    assert signal.getsignal(signal.SIGTERM) == before
    (file,) = profiles.iterdir()
    assert len(read_profile(file, shape_name(MODEL.config)).solos) in (29, 30)
    assert nf("profile", "llama-3-8b", "--quick", "-q", "--seconds", "0") == 0
    assert "0 points measured" in capsys.readouterr().out
    monkeypatch.setattr(gpu_bench, "GpuBench", ProfileBench)
    assert nf("profile", "llama-3-8b", "--quick") == 0
    out, err = capsys.readouterr()
    assert "known before\n" in out
    assert any(f"{POINTS - n} of {POINTS - n} points" in err for n in (29, 30))
    stored = read_profile(file, shape_name(MODEL.config))
    assert (len(stored.solos), len(stored.co_runs)) == (SOLOS, PAIRS)


def test_a_stored_profile_is_drawn(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nf("profile", "llama-3-8b", "--profile", profile, "--plot", str(tmp_path / "c.svg")) == 0
    assert f"{SOLOS} points alone and {PAIRS} pairs" in capsys.readouterr().out
    assert "24 SMs" in (tmp_path / "c.svg").read_text()


def test_a_plan_is_drawn_with_and_without_measured_lengths(profile: str, tmp_path: Path) -> None:
    plain, measured = tmp_path / "plain.svg", tmp_path / "measured.svg"
    assert nf("show", "nano-batch", "--model", "llama-3-8b", "--plot", str(plain)) == 0
    argv = ("show", "nano-batch", "--model", "llama-3-8b", "--layers", "2", "--profile", profile)
    assert nf(*argv, "--plot", str(measured)) == 0
    for file in (plain, measured):
        ElementTree.parse(file)
        assert "decode_attention [0, 1024) layer 1" in file.read_text()
    assert "Order only" in plain.read_text()
    assert " ms</text>" in measured.read_text()
