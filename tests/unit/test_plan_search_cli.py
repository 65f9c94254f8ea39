"""``nf plan profile``, ``nf plan search`` and the drawings of ``nf plan show``, with formulas in place of a GPU."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_profile import KEY, MODEL, SMS, FormulaBench, formula_profile

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.cli import plan as command
from nf.cli import plan_profile, plan_search, plan_shares
from nf.errors import InputError, NfError
from nf.executors.trace import Span
from nf.graphs.plan import PipelinePlan, load_plan, nano_batch_plan
from nf.graphs.plan_store import StoredPlan, find_plans, shape_name
from nf.planning import gpu_bench, gpu_step_bench, profiling
from nf.planning.hardware import ACCELERATORS
from nf.planning.loads import DecodeShare, loads, made_for
from nf.planning.profile_file import read_profile, save_profile
from nf.planning.search import partitioned

QUICK = profiling.quick_extent(2048, SMS)
SOLOS = len(profiling.wanted_solos(MODEL.operations, QUICK))
PAIRS = len(profiling.wanted_pairs(MODEL.operations, QUICK))
POINTS = SOLOS + PAIRS


def nf(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="nf")
    command.add_parser(parser.add_subparsers(dest="command"))
    return command.run(parser.parse_args(["plan", *argv]))


def found_plans(folder: Path | None = None) -> list[StoredPlan]:
    """Of 2,048 tokens: plans of other sizes that ship are an engine's too."""
    found = find_plans(MODEL, "NVIDIA H200", 2048, folder=folder, gpu_sms=SMS)
    return [stored for stored in found if stored.plan.dense_batch_size == 2048]


@pytest.fixture
def profile(tmp_path: Path) -> str:
    return str(save_profile(tmp_path, formula_profile()))


class StepBench:
    """Every other plan than "nano-batch" takes a second."""

    quick = False

    def __init__(self, *_: Any, quick: bool = False) -> None:
        StepBench.quick = quick

    def measure(self, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        return [Measurement(0.8 if plan.name == "nano-batch" else 1.0, 690.0) for _ in loads]

    def trace(self, plan: PipelinePlan, _load: Load) -> list[Span]:
        streams = [stream.name for stream in plan.streams]
        return [Span(streams[0], f"qkv_proj [0, 2048) layer {i}", 100.0 * i, 90.0) for i in range(32)]


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


@pytest.mark.usefixtures("gpu")
def test_a_quick_search_measures_steps_for_a_shorter_time() -> None:
    for options in ([], ["--quick"]):
        assert nf("search", "llama-3-8b", "--count", "0", "--no-store", "-q", *options) == 0
        assert StepBench.quick == bool(options)


def test_the_fastest_plan_is_shown_and_kept(gpu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "use.svg"
    assert nf("search", "llama-3-8b", "--seconds", "0.5", "--count", "2", "--plot", str(picture)) == 0
    out, err = capsys.readouterr()
    assert "fastest: nano-batch, 25.0 % over sequential" in out
    assert "1024 in, 512 out: 682 decode tokens per step" in out
    assert "measuring sequential" in err
    found = {s.plan.name: s for s in found_plans()}
    assert found.keys() <= {"nano-batch", "sequential"}  # where the profile says that this one is as good
    stored = found["nano-batch"]
    assert stored.path.is_relative_to(gpu)
    assert f"kept in {stored.path}" in out
    assert (stored.plan.name, stored.plan.model, stored.plan.gpu) == ("nano-batch", "llama-3-8b", "NVIDIA H200")
    assert stored.plan.loads[0] == (682, 1280)
    (file,) = gpu.rglob("*.measured.json")
    measured = json.loads(file.read_text())
    assert measured["loads"][0]["chosen"] == "nano-batch"
    assert measured["kernels"] == KEY.kernels
    assert "nano-batch (nano-batches, co-resident)" in picture.read_text()
    ElementTree.parse(picture)


def test_what_is_measured_can_be_chosen_by_hand(gpu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.json"
    nf("show", "nano-batch", "--model", "llama-3-8b", "--json")
    mine.write_text(capsys.readouterr().out.replace('"nano-batch"', '"mine"'))
    shares = ("--decode-share", "0.2,0.6")
    argv = ("search", "llama-3-8b", "--count", "0", "--add", str(mine), "--no-store", "--json", "-q", *shares)
    assert nf(*argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert [plan["name"] for plan in result["plans"]][-1] == "mine"
    assert [load["decode_tokens"] for load in result["loads"]] == pytest.approx([410, 1229], abs=2)
    assert [load["chosen"] for load in result["loads"]] == ["nano-batch"] * 2
    assert not gpu.exists()


def test_a_plan_is_kept_for_every_load(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that wins, sequential where nothing does, and one for steps that only decode."""

    def measure(_bench: StepBench, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        wins = plan.name == "nano-batch"
        return [Measurement(0.8 if wins and load.num_decode > 1000 else 1.0, 690.0) for load in loads]

    monkeypatch.setattr(StepBench, "measure", measure)
    argv = ("search", "llama-3-8b", "--count", "0", "--decode-share", "0.2,0.6,1", "--kv-tokens", "898322", "-q")
    picture = tmp_path / "use.svg"
    assert nf(*argv, "--json", "--plot", str(picture)) == 0
    result = json.loads(capsys.readouterr().out)
    assert [load["chosen"] for load in result["loads"]] == ["sequential", "nano-batch", "nano-batch"]
    assert [load["decode_tokens"] for load in result["loads"]][2] == 2048
    stored = {str(s.path): s.plan for s in found_plans()}
    assert sorted(stored) == sorted(result["stored"])
    assert [(stored[path].name, stored[path].loads[0][0]) for path in result["stored"]] == [
        (load["chosen"], load["decode_tokens"]) for load in result["loads"]
    ]
    assert all(Path(path).is_relative_to(gpu) for path in stored)
    assert "nano-batch (nano-batches, co-resident)" in picture.read_text()
    assert nf(*argv) == 0
    assert capsys.readouterr().out.count("kept in ") == 3


@pytest.mark.usefixtures("gpu")
def test_what_was_measured_on_one_machine_is_told_and_stored_on_another(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans, steps, store = tmp_path / "plans", tmp_path / "steps.json", tmp_path / "store"
    load = ("--decode-share", "0.3,0.7")
    nf("search", "llama-3-8b", "--profile", profile, "--predict-only", "--seconds", "0.5", "--plans-dir", str(plans))
    added = [word for file in sorted(plans.iterdir()) for word in ("--add", str(file))]
    measure = ("search", "llama-3-8b", "--count", "0", *added, *load, "--no-store", "--results", str(steps), "-q")
    assert nf(*measure) == 0
    table = capsys.readouterr().out.split("tokens per step")[-1]

    monkeypatch.setattr(StepBench, "measure", lambda *_: pytest.fail("measured again"))
    assert nf(*measure) == 0
    assert capsys.readouterr().out.split("tokens per step")[-1] == table

    monkeypatch.setattr(plan_search, "the_gpu", lambda _: pytest.fail("there is none"))
    monkeypatch.setitem(sys.modules, "highspy", None)  # nothing is searched, whatever --count says
    tell = ("search", "llama-3-8b", *load, "--measured", str(steps), "-q")
    assert nf(*tell, "--profile", profile, "--store", str(store), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [load["chosen"] for load in result["loads"]] == ["nano-batch"] * 2
    assert result["gpu"] == "NVIDIA H200"
    assert result["median_prediction_error"] > 0
    assert len(result["plans"]) == len(added) // 2
    assert all(load["measured_s"] and load["predicted_s"] for plan in result["plans"] for load in plan["loads"])
    stored = found_plans(store)
    assert {s.path.parents[1] for s in stored} == {store}
    (own,) = (s.plan for s in stored if s.plan.name == "nano-batch")
    assert [tokens for tokens, _ in own.loads[:2]] == [load["decode_tokens"] for load in result["loads"]]
    with pytest.raises(NfError, match="not measured in"):  # at this load
        nf("search", "llama-3-8b", "--measured", str(steps), "--no-store")


@pytest.mark.usefixtures("gpu")
def test_plans_that_a_file_of_steps_does_not_have_are_no_candidates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = tmp_path / "steps.json"
    argv = ("search", "llama-3-8b", "--count", "0", "--no-store", "-q", "--json")
    assert nf(*argv, "--results", str(steps)) == 0
    every = [plan["name"] for plan in json.loads(capsys.readouterr().out)["plans"]]
    kept = json.loads(steps.read_text())
    gone = "nano-batch, one stream"
    kept["steps"] = [step for step in kept["steps"] if step["plan"]["name"] != gone]
    steps.write_text(json.dumps(kept))
    assert nf(*argv, "--measured", str(steps)) == 0
    assert [plan["name"] for plan in json.loads(capsys.readouterr().out)["plans"]] == [n for n in every if n != gone]


def test_a_search_that_was_cut_short_chooses_nothing_it_has_not_measured_twice(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, once = tmp_path / "steps.json", StepBench.measure
    calls: list[str] = []

    def cut_short(bench: StepBench, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        calls.append(plan.name)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return once(bench, plan, loads)

    monkeypatch.setattr(StepBench, "measure", cut_short)
    argv = ("search", "llama-3-8b", "--count", "0", "--no-store", "--json")
    with pytest.raises(KeyboardInterrupt):
        nf(*argv, "--results", str(steps))
    monkeypatch.setattr(plan_search, "the_gpu", lambda _: pytest.fail("there is none"))
    assert nf(*argv, "--measured", str(steps)) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [load["chosen"] for load in result["loads"]] == ["sequential"]
    assert [plan["loads"][0]["speed_up"] for plan in result["plans"]] == pytest.approx([1, 1, 1.25, 1])
    again = f"there is no second measurement (sequential at 1024 in, 512 out was only once measured in {steps})"
    assert err.splitlines()[-1] == f"nf plan search: sequential stays: {again}"
    assert not gpu.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "on": {}, "steps": []}'])
def test_no_file_of_measured_steps(text: str, tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"steps.json: cannot be read as measured steps"):
        nf("search", "llama-3-8b", "--measured", str(file))


@pytest.mark.usefixtures("gpu")
def test_steps_of_another_machine_or_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "steps.json"
    argv = ("--count", "0", "--no-store", "-q", "--results", str(file))
    assert nf("search", "llama-3-8b", *argv) == 0
    with pytest.raises(InputError, match=r"has steps of llama-32l-.*, not of qwen2-28l"):
        nf("search", "qwen2-7b", *argv)
    monkeypatch.setattr(gpu_bench, "profile_key", lambda _: replace(KEY, kernels="newer"))
    with pytest.raises(InputError, match="measured with another kernels; name another file"):
        nf("search", "llama-3-8b", *argv)


def test_json_stands_alone_on_standard_output(profile: str) -> None:
    """The solver greets there."""
    argv = ("plan", "search", "llama-3-8b", "--profile", profile, "--predict-only", "--seconds", "0.3", "--json")
    done = subprocess.run([sys.executable, "-m", "nf.cli", *argv], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["loads"][0]["chosen"] is None


def test_the_solver_runs_without_a_standard_output() -> None:
    script = """
import os, sys
from nf.planning.integer_program import IntegerProgram
program = IntegerProgram()
program.variable(0.0, 3.5, gain=1.0, integer=True)
os.close(1)
sys.exit(program.solve(1.0).values != (3.0,))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_requests_are_cut_to_what_the_cache_holds(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("search", "llama-3-8b", "--profile", profile, "--predict-only", "--count", "0", "-q")
    assert nf(*argv, "--decode-share", "0.7", "--kv-tokens", "898322") == 0
    assert "270 in, 633 out: 1,435 decode tokens per step" in capsys.readouterr().out


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


def test_predictions_need_no_gpu(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = tmp_path / "plans"
    argv = ("search", "llama-3-8b", "--profile", profile, "--predict-only", "--seconds", "0.5", "--count", "3")
    assert nf(*argv, "--plans-dir", str(plans), "-q") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama-3-8b predicted (NVIDIA H200, 580, test), 2,048 tokens per step"
    assert lines[3].split() == ["plan", "time", "energy", "speed-up"]
    assert lines[-1].startswith("  by the profile no plan takes less than")
    files = sorted(plans.iterdir())
    assert len(files) == len(lines) - 5
    for file in files:
        assert load_plan(file, MODEL.operations, 2048, gpu_sms=SMS).dense_batch_size == 2048


def test_steps_that_only_decode_are_predicted_and_their_measurements_kept(
    gpu: Path, profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ("--dense-batch-size", "640", "--decode-share", "1", "--kv-tokens", "898322", "-q")
    argv = ("search", "llama-3-8b", "--profile", profile, *load)
    assert nf(*argv, "--predict-only", "--count", "3", "--seconds", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "1024 in, 512 out: 640 decode tokens per step"
    assert len(lines) > 4 + 4
    assert not any("–" in line for line in lines[4:])
    steps = str(tmp_path / "steps.json")
    assert nf(*argv, "--count", "0", "--no-store", "--results", steps) == 0
    table = capsys.readouterr().out
    assert nf(*argv, "--measured", steps, "--store", str(tmp_path / "store")) == 0
    told = capsys.readouterr().out
    assert told.startswith(table)
    assert told.removeprefix(table).endswith("-b640-d640x1280.json\n")
    mixed = ("--dense-batch-size", "640", "--input-len", "1024", "--output-len", "512")
    with pytest.raises(NfError, match="not measured in"):  # with prompts it is another load
        nf("search", "llama-3-8b", *mixed, "--measured", steps, "--no-store", "-q")
    assert not gpu.exists()


def test_loads_may_name_keys(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    shares = ("--decode-share", "0.3,0.5@450")
    argv = ("search", "llama-3-8b", "--profile", profile, "--predict-only", "--count", "0", "--json", *shares)
    assert nf(*argv) == 0
    first, second = json.loads(capsys.readouterr().out)["loads"]
    assert first["input_len"] + first["output_len"] == 1024 + 512 + 1
    assert second["decode_tokens"] == pytest.approx(1024, abs=8)
    assert second["input_len"] + second["output_len"] / 2 == pytest.approx(450, abs=2)


@pytest.mark.usefixtures("gpu")
def test_given_plans_are_measured_at_the_loads_that_they_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files with one pipeline for a load each, and one for all."""
    first, second = (made_for(load) for load in loads(2048, 1024, 512, [DecodeShare(0.3), DecodeShare(0.7)], 10**6))
    half = partitioned(nano_batch_plan(MODEL.operations, 2048), 16, SMS)
    plans = [
        replace(half, name="mine", loads=(first,)),
        replace(half, name="mine", loads=(second,)),
        replace(half, name="all", nano_batches=((0, 512), (512, 2048))),
    ]
    files = [tmp_path / f"{number}.json" for number in range(3)]
    for file, plan in zip(files, plans, strict=True):
        file.write_text(plan.to_json())
    argv = ("search", "llama-3-8b", "--count", "0", "--no-store", "-q", "--json", "--decode-share", "0.3,0.7")
    steps = str(tmp_path / "steps.json")

    def times(*given: Path) -> dict[str, list[bool]]:
        Path(steps).unlink(missing_ok=True)
        assert nf(*argv, "--kv-tokens", "1000000", "--results", steps, "--add", *map(str, given)) == 0
        plans = json.loads(capsys.readouterr().out)["plans"]
        return {plan["name"]: [load["measured_s"] is not None for load in plan["loads"]] for plan in plans}

    found = times(files[0], files[2])
    assert (found["mine"], found["all"]) == ([True, False], [True, True])
    assert times(files[0], files[1])["mine"] == [True, True]
    never = tmp_path / "never.json"
    never.write_text(replace(half, name="never", nano_batches=((0, 256), (256, 2048))).to_json())
    with pytest.raises(InputError, match=r"^--add: .*never\.json was not measured in"):
        nf(*argv, "--kv-tokens", "1000000", "--measured", steps, "--add", str(never))


@pytest.mark.parametrize("shares", ["0", "1.5", "-0.1", "0.1,", "x", "nan", "0.5,2", "0.5@", "0.5@0", "0.5@x", "@9"])
def test_no_shares_of_decode_tokens(shares: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        nf("search", "llama-3-8b", f"--decode-share={shares}")
    said = capsys.readouterr().err
    assert "takes shares above 0 and at most 1 such as 0.1,0.3 or, with so many keys" in said
    assert f"0.5@450, not '{shares}'" in said


EXAMPLE = str(Path(__file__).parents[2] / "docs" / "examples" / "a100-nanoflow.json")


def test_the_papers_search_runs_on_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--dense-batch-size", "1024", "--input-len", "788", "--output-len", "473")
    argv = ("shares", "llama-3-8b", "--profile", EXAMPLE, "--seconds", "0.4", *load)
    assert nf(*argv, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    one, two = result["stage_1"], result["stage_2"]
    assert one["bound_s"] <= one["period_s"] <= result["sequential_s"]
    assert one["period_s"] <= two["period_s"] >= two["bound_s"]
    tokens = [item["tokens"] for item in result["nano_operations"] if item["operation"] == "gate_up_proj"]
    assert sum(stop - start for start, stop in tokens) == 1024
    lines = list(plan_shares.table(result))
    assert len(lines) == 6 + len(result["nano_operations"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("search", "llama-3-8b"), "^no GPU: "),
        (("search", "llama-3-8b", "--count", "-1"), "^--count: must be at least 0"),
        (("search", "no-such-model", "--count", "-1"), "^--count: must be at least 0, got -1"),
        (("search", "no-such-model", "--kv-tokens", "0"), "^--kv-tokens: must be at least 1, got 0"),
        (("search", "no-such-model", "--results", "r", "--predict-only"), "^--predict-only: cannot be used with --r"),
        (("search", "llama-3-8b", "--plot", "x.png"), "^--plot: must name a file that ends in .svg"),
        (("search", "llama-3-8b", "--plot", "x.svg", "--predict-only"), "^--plot: needs a step that runs"),
        (("search", "llama-3-8b", "--plot", "x.svg", "--measured", "s.json"), "leave out --measured"),
        (("search", "llama-3-8b", "--measured", "s.json", "--predict-only"), "^--predict-only: cannot be used with"),
        (("search", "llama-3-8b", "--measured", "s.json", "--results", "r"), "^--measured: cannot be used with --r"),
        (("search", "llama-3-8b", "--measured", "none.json"), "^none.json: there is no such file"),
        (("search", "llama-3-8b", "--results", "no/r.json"), "^--results: .* there is no folder"),
        (("profile", "llama-3-8b", "--seconds", "-1"), "^--seconds: must be at least 0"),
        (("search", "llama-3-8b", "--profile", "none.json", "--predict-only"), "^none.json: there is no such"),
        (("search", "qwen2-7b", "--profile", "PROFILE", "--predict-only"), "has no measurements of qwen2-28l"),
        (("search", "llama-3-8b", "--seconds", "nan"), "^--seconds: must be at least 0"),
        (("shares", "llama-3-8b", "--profile", "PROFILE", "--seconds", "0"), "^--seconds: must be above 0"),
        (("shares", "qwen2-7b", "--profile", "PROFILE"), "has no measurements of qwen2-28l"),
        (("profile", "llama-3-8b", "--quick"), "^no GPU: "),
        (("show", "sequential", "--plot", "x.png"), "^--plot: must name a file"),
    ],
)
def test_what_cannot_be_done(argv: tuple[str, ...], message: str, profile: str) -> None:
    with pytest.raises(NfError, match=message):
        nf(*(profile if word == "PROFILE" else word for word in argv))


def test_a_missing_solver_is_told_before_anything_is_measured(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    monkeypatch.setattr(plan_search, "measured_profile", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"pip install 'nf\[plan\]'"):
        nf("search", "llama-3-8b")
    assert not gpu.exists()


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
