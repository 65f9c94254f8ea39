"""scripts/tune_decode.py: every ring is compiled, used while it is measured, and kept in the record."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_bench_scripts import load_script

from nf.bench.measure import Measurement
from nf.graphs.plan import nano_batch_plan
from nf.kernels import decode_attention
from nf.kernels.decode_attention import Ring
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning import gpu_bench, gpu_step_bench
from nf.planning.profile import CoRun, Cost, Side, SoloKey

SMS = 132
MODEL = declare(shape("llama-3-8b"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(decode_attention, "ON_FEW_SMS", decode_attention.ON_FEW_SMS)  # set back afterwards
    return load_script("tune_decode", monkeypatch)


def rate() -> float:
    """Bytes per second and SM, by the ring that is in use."""
    ring = decode_attention.ON_FEW_SMS
    return 1e9 * ring.warps * (ring.stages - 1) * ring.stage_bytes / 1024


class Bench:
    """Attention beside a GEMM reads half as much, and the GEMM takes a quarter longer."""

    page_size = 0

    def __init__(self, *_: Any, page_size: int) -> None:
        self.ring, Bench.page_size = decode_attention.ON_FEW_SMS, page_size

    def solo(self, key: SoloKey) -> Cost:
        assert self.ring == decode_attention.ON_FEW_SMS
        name, rows, sms, context = key
        assert isinstance(sms, int)
        return Cost(rows * context * 4096 / (sms * rate()) if name == "decode_attention" else 4e-4, 1.0)

    def co_run(self, first: SoloKey, second: SoloKey) -> CoRun:
        seconds = 1.25 * self.solo(first).seconds, 2 * self.solo(second).seconds
        return CoRun(Side(*first, seconds[0]), Side(*second, seconds[1]), 700.0)

    def close(self) -> None:
        self.ring = Ring(0, 0, 0)


class StepBench:
    page_size = 0

    def __init__(self, *_: Any, page_size: int, quick: bool) -> None:
        assert quick
        StepBench.page_size = page_size

    def measure(self, _plan: Any, loads: Sequence[Any]) -> list[Measurement]:
        return [Measurement(1e6 / rate(), 1.0) for _ in loads]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "GpuBench", Bench)
    monkeypatch.setattr(gpu_step_bench, "GpuStepBench", StepBench)
    monkeypatch.setattr("nf.kernels.device.Device", lambda: SimpleNamespace(sms=SMS))
    monkeypatch.setattr("nf.device_choice.need_gpu", lambda _model: None)


def test_a_bundle_has_the_tiles_of_every_ring(script: Any) -> None:
    names = [source.name for source in script.sources()]
    assert len(set(names)) == len(names)
    shipped = {source.name for source in decode_attention.sources()}
    assert shipped < set(names)
    for ring in script.RINGS:
        assert f"decode_attention_d128_p16_t{ring.tile_keys(128)}_w{ring.warps}" in names
        assert ring.shared_bytes <= 227 * 1024
    assert script.RINGS[0] == decode_attention.ON_FEW_SMS
    assert "mixtral-8x7b" not in script.models()
    assert "llama-3-8b" in script.models()


@pytest.mark.usefixtures("gpu")
def test_every_ring_is_measured_on_every_partition(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "rings.json"
    plan.write_text(nano_batch_plan(MODEL.operations, 2048).to_json())
    argv = ["tune_decode", "measure", "--sms", "16", "20", "--plan", str(plan), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    assert script.main() == 0
    record = json.loads(out.read_text())
    assert len(record["points"]) == 2 * len(script.RINGS)
    for point, (ring, sms) in zip(
        record["points"], [(ring, sms) for ring in script.RINGS for sms in (16, 20)], strict=True
    ):
        assert point["ring"] == [ring.warps, ring.stages, ring.stage_bytes]
        alone = sms * 1e9 * ring.warps * (ring.stages - 1) * ring.stage_bytes / 1024
        assert point["alone_bytes_per_second"] == pytest.approx(alone)
        assert point["beside_bytes_per_second"] == pytest.approx(alone / 2)
        assert point["gemm_keeps"] == pytest.approx(0.8)
    assert [step["ring"] for step in record["steps"]] == [point["ring"] for point in record["points"][::2]]
    for step in record["steps"]:
        warps, stages, stage_bytes = step["ring"]
        assert step["seconds"] == [pytest.approx(1e6 / (1e9 * warps * (stages - 1) * stage_bytes / 1024))]
    assert script.RINGS[0] == decode_attention.ON_FEW_SMS  # as before
    assert "7 × 2 × 16 KB on 16 SMs" in capsys.readouterr().out


@pytest.mark.usefixtures("gpu")
def test_one_ring_may_be_measured_on_other_pages(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "rings.json"
    plan.write_text(nano_batch_plan(MODEL.operations, 2048).to_json())
    argv = ["tune_decode", "measure", "--out", str(out), "--plan", str(plan), "--ring", "8x3x8", "--page-size", "32"]
    monkeypatch.setattr(sys, "argv", [*argv, "--sms", "16"])
    assert script.main() == 0
    record = json.loads(out.read_text())
    assert [point["ring"] for point in record["points"]] == [[8, 3, 8192]]
    assert record["page_size"] == Bench.page_size == StepBench.page_size == 32


def test_an_unknown_ring_is_refused(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_decode", "measure", "--out", str(tmp_path / "x.json"), "--ring", "9x9x9"])
    with pytest.raises(SystemExit):
        script.main()
    assert "must be one of 12x2x8, 8x3x8, 7x4x8, 6x4x8, 7x2x16, 6x2x16, not '9x9x9'" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_decode", "measure", "--out", str(tmp_path / "x.json")])
    assert script.main() == 1
    assert capsys.readouterr().err.startswith("tune_decode: no GPU")


@pytest.mark.parametrize("sms", ["13", "0", "66"])
def test_partitions_that_are_none_or_not_few_are_refused(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sms: str
) -> None:
    argv = ["tune_decode", "measure", "--sms", sms, "--out", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", argv)
    assert script.main() == 1
    assert f"--sms: must be even and at most 64, the most that are few, not {sms}" in capsys.readouterr().err
