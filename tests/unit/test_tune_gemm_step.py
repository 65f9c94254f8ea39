"""scripts/tune_gemm_step.py: where a plan's products run, what is tried there and what is kept, with made-up steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_profile import MODEL, SMS
from test_bench_scripts import load_script

from nf.bench.gemm_cases import MODELS
from nf.graphs.plan import PipelinePlan, nano_batch_plan, sequential_plan
from nf.kernels import gemm
from nf.planning.search import partitioned


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    table = dict(gemm._table())  # choices end with the test
    monkeypatch.setattr(gemm, "_table", lambda: table)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return load_script("tune_gemm_step", monkeypatch)


def cut_plan() -> PipelinePlan:
    plan = partitioned(nano_batch_plan(MODEL.operations, 2048), 24, SMS)
    return replace(plan, nano_batches=((0, 512), (512, 2048)))


def test_places_are_the_products_on_partitions(script: Any) -> None:
    found = script.places(cut_plan())
    names = ["gate_up", "down", "qkv", "o"]
    assert found == [(name, rows, 108) for rows in (1536, 512) for name in names]
    assert script.places(sequential_plan(MODEL.operations, 2048)) == []


def test_what_makes_the_step_clearly_faster_stays(script: Any) -> None:
    """The second of the four candidates for the longest product saves time, the third as good as none."""
    n, k = MODELS["llama-3-8b"]["gate_up"]
    options = script.candidates("gate_up", n, k, 1536, 108, 4)
    assert len({*options}) == len(options) >= 3
    saved = {options[1]: 0.05, options[2]: 0.05 + script.WORTH / 4}

    def step() -> float:
        return 1 - saved.get(gemm.choose(n, k, 1536, 108, "swiglu"), 0.0)

    points = list(script.descend("llama-3-8b", cut_plan(), step, 4))
    assert [(p["name"], p["rows"]) for p in points] == [(name, rows) for name, rows, _ in script.places(cut_plan())]
    assert points[0]["times"][0] == [options[0].config.label, options[0].group, 1]
    assert gemm.choose(n, k, 1536, 108, "swiglu") == options[1]
    assert all(point["times"][0][2] == pytest.approx(0.95) for point in points[1:])


@pytest.mark.parametrize("rows", [40, 128, 1450, 1536])
def test_a_preferred_choice_is_taken_whatever_else_the_block_has(script: Any, rows: int) -> None:
    n, k = MODELS["llama-3-8b"]["down"]
    for other in script.candidates("down", n, k, rows, 108, 4):
        gemm.prefer(n, k, rows, 108, other)
        assert gemm.choose(n, k, rows, 108, "residual") == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (sequential_plan(MODEL.operations, 2048).to_json(), "has no GEMM on a partition"),
        (cut_plan().to_json().replace("[0, 512]", "[0, 500]"), "covers tokens [500, 512)"),
        ("{", "plan.json"),
    ],
)
def test_a_plan_that_cannot_be_tuned_is_refused_before_the_gpu_is_used(
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    message: str,
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    arguments = ["tune_gemm_step", "llama-3-8b", "--plan", str(file), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert str(file) in told
    assert message in told


def test_a_record_that_cannot_be_written_is_refused_before_the_gpu_is_used(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none" / "out.json"
    arguments = ["tune_gemm_step", "llama-3-8b", "--plan", str(tmp_path / "plan.json"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    assert f"--out: {out} cannot be written: there is no folder" in capsys.readouterr().err
