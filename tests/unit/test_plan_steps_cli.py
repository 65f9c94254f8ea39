"""Steps that ``nf plan search`` measured: kept, gone on with, and told on another machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_profile import KEY, MODEL, SMS
from plan_cli_cases import StepBench, found_plans, nf

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.cli import plan_search
from nf.errors import InputError, NfError
from nf.graphs.plan import PipelinePlan, nano_batch_plan
from nf.planning import gpu_bench
from nf.planning.loads import DecodeShare, loads, made_for
from nf.planning.search import partitioned


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


def test_of_a_file_with_steps_of_several_sizes_those_of_one_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[2] / "docs/benchmarks/2026-11-29-h200-plans-decode-only.json"
    load = ("--dense-batch-size", "640", "--decode-share", "1")
    assert nf("search", "llama-3-8b", "--measured", str(file), *load, "--no-store", "-q", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["dense_batch_size"], len(result["plans"])) == (640, 10)
    assert all(load["measured_s"] for plan in result["plans"] for load in plan["loads"])
