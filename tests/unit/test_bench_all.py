"""scripts/bench_all.py: what fits, where output goes, and that every command it has is one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_bench_scripts import load_script

from nf.cli.main import build_parser


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_script("bench_all", monkeypatch)


def run_main(script: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_all", *options])
    return script.main()


def test_records_and_logs_of_what_fits(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = f"{sys.executable} -c \"import sys; print('said'); open(sys.argv[1], 'w').write('kept')\" {{out}}.json"
    runs = [
        script.Run("short", echo, 10.0),
        script.Run("long", echo, 5000.0),
        script.Run("fails", f"{sys.executable} -c 'raise SystemExit(3)'", 10.0),
        script.Run("hangs", f"{sys.executable} -c 'import time; time.sleep(60)'", 0.1),
        script.Run("trace", f"{echo} {{trace}}", 10.0),
    ]
    monkeypatch.setattr(script, "RUNS", runs)
    assert run_main(script, monkeypatch, "--out", str(tmp_path / "new"), "--seconds", "100") == 1
    told = [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["short: ok", "long: left out", "fails: exit code 3", "hangs: took too long"]
    assert (tmp_path / "new" / "short.log").read_text() == "said\n"
    assert (tmp_path / "new" / "short.json").read_text() == "kept"
    assert run_main(script, monkeypatch, "--out", str(tmp_path), "--only", "trace", "--trace", __file__) == 0
    assert capsys.readouterr().out.startswith("trace: ok")


def test_a_trace_that_is_not_there(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(script, monkeypatch, "--out", "x", "--trace", "none.csv")
    assert ended.value.code == 2
    assert "--trace: there is no file none.csv" in capsys.readouterr().err


def test_every_command_is_there(script: Any) -> None:
    for run in script.RUNS:
        python, kind, name, *options = script.shlex.split(run.command.format(out="x", trace=__file__))
        assert python == sys.executable
        if kind == "-m" and name == "nf.cli":
            build_parser().parse_args(options)  # leaves with an error where an option is unknown
        elif kind != "-m":
            known = (script.ROOT / kind).read_text() + (script.ROOT / "nf" / "cli" / "options.py").read_text()
            assert all(f'"{word}"' in known for word in [name, *options] if word.startswith("--"))
