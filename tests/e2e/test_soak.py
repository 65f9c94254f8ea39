"""scripts/soak.py on the bundled model for a few seconds, and that it notices what it is there to notice."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nf.engine import Engine
from nf.request import Request
from nf.scheduler.pages import PagePool
from nf.scheduler.scheduler import Scheduler

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak.py"
SHORT = ("nf-tiny", "--device", "cpu", "--rate", "20", "--max-prompt", "80", "--max-tokens", "120", "--burst", "1")


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["soak"] = module = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module.main


def complaints(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG: ")]


def test_everything_comes_back(main: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    code = main([*SHORT, "--seconds", "3", "--json", str(file)])
    printed = capsys.readouterr().out
    # What came up in so short a time depends on the machine; a run of minutes fails on it.
    assert not [line for line in printed.splitlines() if "WRONG" in line and "never seen" not in line]
    assert " abort in decode" in printed
    assert " cancel in prefill" in printed
    record = json.loads(file.read_text())
    results = record["results"]
    assert (record["benchmark"], record["model"], record["asked"]["burst"]) == ("soak", "nf-tiny", 1)
    assert record["environment"].keys() >= {"date", "commit", "versions"}
    assert record["options"]["num_host_pages"] == results["idle"]["last"]["free_host_pages"]
    assert results["idle"]["first"].keys() == results["idle"]["last"].keys()
    assert results["counts"]["requests"] >= results["counts"]["whole"] > 0
    assert bool(results["wrong"]) == bool(code)
    assert f"{results['counts']['requests']:,} requests" in printed


def test_a_lost_request_is_noticed(
    main: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Scheduler.add
    monkeypatch.setattr(
        Scheduler, "add", lambda self, request: None if request.request_id.endswith("3") else add(self, request)
    )
    assert main([*SHORT, "--seconds", "1", "--patience", "3"]) == 1
    assert any("3 has not ended after 3 s" in line for line in complaints(capsys))


def test_an_abort_without_effect_is_noticed(
    main: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "abort", lambda _self, _request_id: None)
    assert main([*SHORT, "--seconds", "2"]) == 1
    assert any("(abort) of " in line and "ended with {'length'}" in line for line in complaints(capsys))


def test_a_leaked_page_is_noticed(
    main: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Scheduler.finish

    def leak(self: Scheduler, request_id: str, index: int | None = None) -> None:
        finish(self, request_id, index)
        if self.num_free_pages > 1:
            pool: PagePool = self._state.pages
            pool.allocate(1)

    monkeypatch.setattr(Scheduler, "finish", leak)
    assert main([*SHORT, "--seconds", "1", "--patience", "3"]) == 1
    assert any("the scheduler's state does not hold together" in line for line in complaints(capsys))


def test_an_open_file_per_request_is_noticed(
    main: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add, opened = Scheduler.add, list[int]()

    def open_one(self: Scheduler, request: Request) -> None:
        opened.append(os.open(os.devnull, os.O_RDONLY))
        add(self, request)

    monkeypatch.setattr(Scheduler, "add", open_one)
    assert main([*SHORT, "--seconds", "1"]) == 1
    for file in opened:
        os.close(file)
    assert any("file_descriptors was " in line for line in complaints(capsys))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nix"], "soak: nix: is neither a directory"),
        (["nf-tiny", "--json", "/no/such/folder/x"], "soak: --json: /no/such/folder/x cannot be written"),
        (["nf-tiny", "--max-prompt", "4000"], "soak: --max-model-len: 4300 is more than 1024"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    main: Any, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert printed.count("\n") == 1
