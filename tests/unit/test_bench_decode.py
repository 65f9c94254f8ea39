"""scripts/bench_decode.py: a row per number of sequences, and a bound that counts what a step must do."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from test_bench_scripts import load_script

from nf.bench.measure import Measurement
from nf.bench.roofline import Ceilings
from nf.models.registry import declare
from nf.models.shapes import shape


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_script("bench_decode", monkeypatch)


def test_a_row_for_each_number_of_sequences(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def measured(executor: Any, batch: Any) -> Measurement:
        executor.submit(batch).result()
        seen.append((batch.num_decode, batch.kv_lens.tolist()))
        return Measurement(0.002, math.nan)  # as where the driver does not tell

    monkeypatch.setattr(script, "measure_step", measured)
    record = tmp_path / "decode.json"
    options = ["--device", "cpu", "--sequences", "1", "3", "--context", "40", "--json", str(record)]
    monkeypatch.setattr(sys, "argv", ["bench_decode", "nf-tiny", *options])
    assert script.main() == 0
    assert seen == [(1, [40]), (3, [40] * 3)]
    document = json.loads(record.read_text(), parse_constant=pytest.fail)
    assert document["options"]["device"] == "cpu"
    rows = document["rows"]
    assert [(row["sequences"], row["ms"], row["tokens_per_second"], row["joules_per_token"]) for row in rows] == [
        (1, 2.0, 500.0, None),
        (3, 2.0, 1500.0, None),
    ]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_bound_of_one_sequence_is_reading_the_weights_and_of_many_the_arithmetic(script: Any) -> None:
    model = declare(shape("llama-3-8b"))
    ceilings = Ceilings(660e12, 1e-12, 4.6e12, 1.3e-10, 700.0)
    layers, head, kv = 32 * 4096 * (6144 + 4096 + 28672 + 14336), 128256 * 4096, 32 * 2 * 8 * 128  # values
    one = (2 * (layers + head) + 2 * kv * 1000) / 4.6e12
    assert script.bound(model, 1, 1000, ceilings) == pytest.approx(one, rel=2e-3)
    many = 2 * 2048 * (layers + head) / 660e12 + 2048 * 2 * kv * 1000 / 4.6e12
    assert script.bound(model, 2048, 1000, ceilings) == pytest.approx(many, rel=0.05)


def test_more_sequences_than_the_engine_takes(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--sequences", "64", "--max-num-seqs", "8", "--context", "9"]
    monkeypatch.setattr(sys, "argv", ["bench_decode", "nf-tiny", *options])
    assert script.main() == 2
    assert "--sequences: 64 are more than the engine runs at a time" in capsys.readouterr().err
