"""``nf plan search`` and ``nf plan shares``, with formulas in place of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_profile import KEY, MODEL, SMS
from plan_cli_cases import StepBench, found_plans, nf

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.cli import plan_search, plan_shares
from nf.errors import InputError, NfError
from nf.graphs.plan import PipelinePlan, load_plan


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


def test_a_profile_that_is_too_short_is_told_of(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("search", "llama-3-8b", "--profile", profile, "--predict-only", "--count", "0")
    assert nf(*argv) == 0
    assert "extrapolated" not in capsys.readouterr().err
    assert nf(*argv, "--dense-batch-size", "4096") == 0
    assert "the profile ends at 2,048 rows; what is beyond is extrapolated" in capsys.readouterr().err


def test_requests_are_cut_to_what_the_cache_holds(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("search", "llama-3-8b", "--profile", profile, "--predict-only", "--count", "0", "-q")
    assert nf(*argv, "--decode-share", "0.7", "--kv-tokens", "898322") == 0
    assert "270 in, 633 out: 1,435 decode tokens per step" in capsys.readouterr().out


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


def test_loads_may_name_keys(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    shares = ("--decode-share", "0.3,0.5@450")
    argv = ("search", "llama-3-8b", "--profile", profile, "--predict-only", "--count", "0", "--json", *shares)
    assert nf(*argv) == 0
    first, second = json.loads(capsys.readouterr().out)["loads"]
    assert first["input_len"] + first["output_len"] == 1024 + 512 + 1
    assert second["decode_tokens"] == pytest.approx(1024, abs=8)
    assert second["input_len"] + second["output_len"] / 2 == pytest.approx(450, abs=2)


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
