"""scripts/bench_host.py measures the steps it says."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from test_bench_scripts import load_script


@pytest.mark.parametrize("options", [[], ["--running", "300", "--stream"]])
def test_every_step_decodes_all_sequences(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script: Any = load_script("bench_host", monkeypatch)
    batches = []
    submit = script.NoExecutor.submit

    def note(self: Any, batch: Any) -> Any:
        batches.append((batch.num_decode, batch.num_tokens))
        return submit(self, batch)

    monkeypatch.setattr(script.NoExecutor, "submit", note)
    monkeypatch.setattr(sys, "argv", ["bench_host", *options, "--steps", "7", "--json"])
    assert script.main() == 0
    record = json.loads(capsys.readouterr().out)
    running = record["running"]
    assert (record["steps"], record["stream"]) == (7, "--stream" in options)
    assert record["p99_us"] >= record["median_us"] > 0
    assert batches == [(0, 16 * running)] + 8 * [(running, running)]
