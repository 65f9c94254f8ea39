"""``nf bench kernels`` as a command: its table and its record, with rows that no GPU has measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from nf.bench import cublas, kernels
from nf.bench.kernels import Row
from nf.bench.measure import Measurement
from nf.cli import main
from nf.cli.files import check_picture, check_writable
from nf.errors import InputError
from nf.files import make_folder

ROWS = [
    Row("gemm", "a layer", Measurement(2e-3, 1.2), 1.4e12, "FLOP", "cuBLAS", 1.01, 1 / 1.03, (("joules", 0.99),)),
    Row("norm", "1024 tokens", Measurement(1e-5, math.nan), 3e7, "B", "streaming copy", 0.8, 0.85),
    Row("moe", "route", Measurement(1e-5, 0.006), 3e7, "B", "copy", 0.9, None),
    Row("launch", "norm", Measurement(4e-6, math.nan), 1, "launch", "the speed at 5 µs", 1.25, 1.0),
]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows that the run yields; it is stopped where some are missing."""
    rows = list(ROWS)

    def run(only: list[str]) -> Iterator[Row]:
        assert only in ([], ["gemm"])
        yield from rows
        if len(rows) < len(ROWS):
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "run", run)
    monkeypatch.setattr("nf.device_choice.need_gpu", lambda: None)
    monkeypatch.setattr(cublas, "version", lambda: 130200)
    return rows


@pytest.mark.usefixtures("measured")
def test_table_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "k.json"
    assert main(["bench", "kernels", "--json", str(file)]) == 0
    printed = capsys.readouterr()
    first, second, third, fourth = printed.out.splitlines()
    assert "700.0 TFLOP/s" in first
    assert "600 W" in first
    assert "1.010 × cuBLAS (floor 0.97), 0.990 × joules" in first
    assert "0.800 × streaming copy (floor 0.85, missed)" in second
    assert " W " not in second
    assert third.endswith("0.900 × copy")
    assert "4.0 µs" in fourth
    assert not {"B/s", "FLOP/s"} & set(fourth.split())
    assert printed.err == "4 cases in 0 s, 1 below their floor\n"
    record = json.loads(file.read_text())
    assert record["environment"]["cublas"] == 130200
    assert record["environment"]["versions"]["nf"]
    rows = record["rows"]
    assert [row["measured"]["joules"] for row in rows] == [1.2, None, 0.006, None]
    assert [(row["score"], row["floor"], row["holds"]) for row in rows[1:3]] == [(0.8, 0.85, False), (0.9, None, True)]


def test_what_was_measured_is_kept_when_it_is_stopped(measured: list[Row], tmp_path: Path) -> None:
    del measured[2:]
    file = tmp_path / "k.json"
    assert main(["bench", "kernels", "--json", str(file), "--only", "gemm"]) == 130
    assert len(json.loads(file.read_text())["rows"]) == 2


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.device_choice.gpu_devices", lambda: ([], "there is no CUDA driver"))
    assert main(["bench", "kernels"]) == 1
    assert capsys.readouterr().err == "nf bench kernels: no GPU: there is no CUDA driver\n"


def test_without_cupy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.device_choice.need_gpu", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["bench", "kernels"]) == 1
    assert capsys.readouterr().err == "nf bench kernels: cupy is not installed (pip install 'nf[cuda]')\n"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("", "it is a folder"),
        ("none/x.svg", "there is no folder"),
        ("/proc/1/mem/x.svg", "there is no folder"),
    ],
)
def test_files_that_cannot_be_written(tmp_path: Path, file: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"^--json: .* cannot be written: {said}"):
        check_writable("--json", tmp_path / file)


def test_folders(tmp_path: Path) -> None:
    assert make_folder("--out", tmp_path / "a" / "b").is_dir()
    assert make_folder("--out", tmp_path) == tmp_path
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        with pytest.raises(InputError, match=r"^--out: .*file.* cannot be a folder: "):
            make_folder("--out", tmp_path / folder)


def test_files_that_can(tmp_path: Path) -> None:
    for file in (None, tmp_path / "new.svg", "here.svg", "/dev/null"):
        check_writable("--json", file)
    assert list(tmp_path.iterdir()) == []
    check_picture(str(tmp_path / "new.svg"))
    with pytest.raises(InputError, match=r"^--plot: must name a file that ends in \.svg, not 'x\.png'"):
        check_picture("x.png")
