"""scripts/tune_gemm.py: what it tries at a point, on doubles of cupy and the kernels, and what it makes of records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_bench_cases import STREAM, Array, Cupy, Loader, Memory, give
from test_bench_scripts import load_script

from nf.bench import cublas, gemm_cases
from nf.kernels import gemm

RECORD: dict[str, Any] = {
    "date": "2026-01-01",
    "points": [
        {
            **{"model": "llama-3-8b", "name": "o", "n": 4096, "k": 4096, "sms": 132, "rows": 512, "cublas": 2e-5},
            "times": [["128x256_1x1x1", 8, 2e-5]],
        }
    ],
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = load_script("tune_gemm", monkeypatch)
    memory = Memory()
    cupy = Cupy()
    cupy.cuda.ExternalStream = lambda pointer: pointer
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(Array, "memory", memory, raising=False)
    monkeypatch.setattr(made, "load_bundle", lambda sources, *_: sources)
    monkeypatch.setattr(made, "KernelLoader", lambda sources: Loader(memory, sources))
    monkeypatch.setattr(made, "new_record", lambda: {"date": "2026-01-01", "points": []})
    monkeypatch.setattr(made, "normal", lambda *shape: give(cupy.empty(shape, cupy.uint16)))
    monkeypatch.setattr(made, "partition_stream", lambda _sms: STREAM)
    monkeypatch.setattr(cublas, "_cublas", lambda: (None, None))

    def in_turn(_stream: Any, calls: list[list[Any]], estimate: float) -> list[float]:
        assert estimate > 0
        for ours in calls[1:]:
            for call in ours:
                call(STREAM)
        return [1e-3 * (1 + index) for index in range(len(calls))]

    monkeypatch.setattr(made, "_in_turn", in_turn)
    return made


def measured(script: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> list[dict[str, Any]]:
    common = ["measure", "--bundle", "b", "--models", "llama-3-8b", "--sms", "132", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["tune_gemm", *common, *options])
    script.main()
    points: list[dict[str, Any]] = json.loads(out.read_text())["points"]
    return points


def test_from_many_rows_on_evictions_are_tried_in_two_orders(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--names", "o", "--rows", "512", "1024", "--count", "3", "--evict", "nf", "fl"]
    few, many = measured(script, monkeypatch, tmp_path / "a.json", *options)
    assert not any(label.endswith(("nf", "fl")) for label, *_ in few["times"])
    tried = [(label, group) for label, group, _ in many["times"]]
    assert len(set(tried)) == len(tried)
    plain = [label for label, _ in tried if not label.endswith(("nf", "fl"))]
    for evict in ("nf", "fl"):
        told = {(label, group) for label, group in tried if label.endswith(evict)}
        assert {label.removesuffix(f"_{evict}") for label, _ in told} <= set(plain)
        assert {group for _, group in told} == {1, 8}
    assert {(plain[0], group) for group in (1, 4, 8, 16)} <= set(tried)


def test_what_an_earlier_record_has_near_the_best_is_tried_again(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    n, k = gemm_cases.MODELS["llama-3-8b"]["o"]
    best = gemm.GemmConfig(128, 256, 2, 1, evict="lf").label
    point = RECORD["points"][0] | {"n": n, "k": k, "rows": 2048}
    point["times"] = [[best, 1, 1e-4], ["128x128_2x1x1", 8, 2e-4]]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(RECORD | {"points": [point]}))
    options = ["--names", "o", "--rows", "2048", "--previous", str(earlier), "--evict", "lf"]
    (found,) = measured(script, monkeypatch, tmp_path / "b.json", *options)
    assert found["times"][0][:2] == [best, 1]


def test_of_a_point_measured_twice_the_later_record_counts(script: Any, tmp_path: Path) -> None:
    files = []
    for date, fastest in (("2026-01-02", "128x256_2x1x1"), ("2026-01-01", "128x128_2x1x1")):
        times = [[label, 8, 1e-4 if label == fastest else 2e-4] for label in ("128x256_2x1x1", "128x128_2x1x1")]
        point = {"model": "m", "name": "o", "n": 4096, "k": 4096, "sms": 132, "rows": 2048, "cublas": 1e-4}
        files.append(tmp_path / f"{date}.json")
        files[-1].write_text(json.dumps({"date": date, "points": [point | {"times": times}]}))
    for order in (files, files[::-1]):
        (entry,) = script.reduce(order)["entries"]
        assert entry["config"] == "128x256_2x1x1"


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("{", (), "is no record"),
        ("[]", (), "is no record"),
        (json.dumps(RECORD | {"date": None}), (), "is no record"),
        (json.dumps(RECORD).replace("128x256_1x1x1", "nonsense"), (), "is no record"),
        (json.dumps(RECORD | {"points": []}), (), "leave no point"),
        (json.dumps(RECORD), ("--only", "128x128_1x1x1"), "leave no point"),
        (None, (), "No such file"),
    ],
)
def test_what_is_no_record_leaves_the_table_alone(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    options: tuple[str, ...],
    reason: str,
) -> None:
    table, file = tmp_path / "table.json", tmp_path / "a.json"
    table.write_text("the table")
    monkeypatch.setattr(script, "TABLE", table)
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["tune_gemm", "reduce", str(file), *options])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 1
    assert reason in capsys.readouterr().err
    assert table.read_text() == "the table"
