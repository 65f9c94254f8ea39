"""``nf plan estimate``: the table, the JSON, the heat maps, the current GPU, and what is refused."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from nf.cli import plan as command
from nf.errors import InputError, ModelError
from nf.planning.figures import Figure
from nf.planning.hardware import ACCELERATORS, accelerator
from nf.planning.heat_map import colour, differs, heat_maps


def nf(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="nf")
    command.add_parser(parser.add_subparsers(dest="command"))
    return command.run(parser.parse_args(["plan", "estimate", *argv]))


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "llama-2-70b --gpu a100-80gb --tp 8 --input-len 512 --output-len 1024 --dense-batch-size 2048"
    assert nf(*argv.split(), "--counting", "paper") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama-2-70b on 8 × A100 80 GB, 512 tokens in and 1024 out"
    assert "Equations 1 to 4 at 2,048 tokens: compute-bound" in lines
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    assert rows["gate_up_proj"] == ["153,931.6", "96.64", "0.00", "61.671", "6.040", "0.000", "compute"]
    assert rows["decode_attention"][-1] == "memory"
    assert rows["all_reduce"][-1] == "network"
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines)


def test_a_mixture_says_what_is_active_and_power_is_where_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert nf("mixtral-8x7b", "--gpu", "H200") == 0
    out = capsys.readouterr().out
    assert "parameters   46.70 G, 12.88 G of them active\n" in out
    assert "power roofline, 700 W" in out
    assert max(map(len, out.splitlines())) <= 100
    assert nf("mixtral-8x7b", "--gpu", "mi300", "--tp", "4") == 0
    assert "the energy of this accelerator was not measured" in capsys.readouterr().out


def test_json_has_everything_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert nf("llama-3-8b", "--gpu", "h200", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == found["active_parameters"] == 8_030_261_248
    assert found["weight_bytes"] == 2 * 8_030_261_248
    assert found["kv_bytes_per_token"] == 131_072
    assert found["dense_batch_size"] == 2234
    assert found["bound"] == "compute"
    assert found["machine"]["measured"]["power"]["cap_watts"] == 700
    for key in ("flops", "memory_bytes", "network_bytes", "compute_s", "memory_s", "network_s"):
        assert sum(row[key] for row in found["operations"]) == pytest.approx(found["total"][key])
    roofline = found["bounds"][-1]
    assert roofline["tokens_per_s_per_gpu"] * roofline["joules_per_token"] == pytest.approx(700)


def test_a_directory_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nf("nf-tiny", "--gpu", "h200", "--input-len", "64", "--output-len", "64") == 0
    assert capsys.readouterr().out.startswith("nf-tiny on 1 × H200")
    with pytest.raises(ModelError, match=r"config.json: does not exist"):
        nf(str(tmp_path), "--gpu", "h200")


def test_the_plot_is_an_svg_with_a_cell_for_each_value(tmp_path: Path) -> None:
    file = tmp_path / "figures.svg"
    assert nf("qwen2-7b", "--gpu", "a100-80gb", "--plot", str(file)) == 0
    root = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    cells = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(cells) == 1 + 7 * 13 + 6 * 6  # the ground, and both figures with a row more
    assert {"qwen2-7b", "qwen2-7b, 1 GPU", "LMSYS-Chat"} <= {*texts}
    assert {"[0.12]", "[0.58]"} <= {*texts}  # Mixtral's row of Fig. 3 differs from the printed one
    assert sum(text is not None and text.startswith("[0") for text in texts) == 6


def test_a_heat_map_escapes_names_and_marks_what_is_missing() -> None:
    figure = Figure("a < b", "memory", ("<&>", "x" * 60), ("one",), ((None,), (2.0,)), ((0.5,), (2.0,)))
    root = ElementTree.fromstring(heat_maps([figure]))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "<&>", "–", "2.00", "[0.50]"} <= {*texts}
    assert float(root.attrib["width"]) > 60 * 7


def test_colours_run_from_compute_to_the_resource() -> None:
    assert colour(0.0, "network") == "#f2c14e"
    assert colour(1.0, "network") == colour(1.0, "memory") == "#f7f5ef"
    assert colour(1e9, "network") == "#2b6cb0"
    assert colour(1e9, "memory") == "#2f855a"


@pytest.mark.parametrize(
    ("value", "printed", "expected"),
    [(0.066, 0.07, False), (0.064, 0.07, True), (1.05, 1.008, False), (1.07, 1.008, True), (None, 0.5, True)],
)
def test_a_difference_is_more_than_five_per_cent_and_than_rounding(
    value: float | None, printed: float, expected: bool
) -> None:
    assert differs(value, printed) is expected
    assert not differs(value, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gpt-2", "--gpu", "h200"], r"^MODEL: must be a directory, a hub name like org/name or one of llama-3-8b, "),
        (["", "--gpu", "h200"], r"^MODEL: must be a directory, .*, not ''$"),
        (["llama-3-8b", "--gpu", "a100"], r"^--gpu: .*not 'a100'; did you mean a100-40gb or a100-80gb\?$"),
        (["llama-3-8b", "--gpu", "h200", "--tp", "3"], r"^--tp: must be one of 1, 2, 4, 8, "),
        (["llama-3-8b", "--gpu", "h200", "--input-len", "0"], r"^--input-len: must be at least 1"),
        (["llama-3-8b", "--gpu", "h200", "--counting", "mine"], r"^--counting: must be one of engine, paper, "),
        (["llama-3-8b", "--gpu", "h200", "--plot", "a.png"], r"^--plot: must name a file that ends in \.svg"),
    ],
)
def test_faults_are_input_errors_that_name_the_option(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nf(*argv)


def fake_driver(name: str, attributes: dict[str, int], *, count: int = 1) -> ModuleType:
    """cuda.bindings.driver as far as it is read: every call answers (error, value)."""

    def answer(value: Any) -> Any:
        return (0, value)

    driver = ModuleType("cuda.bindings.driver")
    kinds = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{key}": key for key in attributes})
    driver.__dict__.update(
        CUdevice_attribute=kinds,
        cuInit=lambda _: (0,) if count else (100,),
        cuDeviceGet=answer,
        cuDeviceGetName=lambda length, _: answer(name.encode().ljust(length, b"\0")),
        cuDeviceTotalMem=lambda _: answer(150_000_000_000),
        cuDeviceGetAttribute=lambda kind, _: answer(attributes[kind]),
    )
    return driver


def test_the_current_gpu_is_the_tables_with_the_drivers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake_driver("NVIDIA H200", {}))
    found = accelerator("auto")
    assert (found.name, found.memory, found.compute) == ("h200", 150e9, ACCELERATORS["h200"].compute)
    assert found.measured.power is not None


H200_ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "MULTIPROCESSOR_COUNT": 132,
    "CLOCK_RATE": 1_980_000,  # kHz
    "MEMORY_CLOCK_RATE": 3_201_000,
    "GLOBAL_MEMORY_BUS_WIDTH": 6144,
}


def test_another_gpu_is_what_its_attributes_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attributes of an H200 under another name give its data sheet, at its highest clock, within a tenth."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake_driver("NVIDIA Other", H200_ATTRIBUTES))
    found, sheet = accelerator("auto"), ACCELERATORS["h200"]
    assert found.memory_bandwidth == pytest.approx(sheet.memory_bandwidth, rel=0.05)
    assert found.compute == pytest.approx(sheet.compute, rel=0.1)
    assert nf("llama-3-8b") == 0
    assert capsys.readouterr().out.startswith("llama-3-8b on 1 × NVIDIA Other")
    with pytest.raises(InputError, match=r"^--tp: must be 1 on NVIDIA Other"):
        nf("llama-3-8b", "--tp", "2")


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (None, "cuda-python is not installed"),
        (fake_driver("none", {}, count=0), "100"),
        (ModuleType("cuda.bindings.driver"), "the CUDA driver cannot be loaded"),
        (
            fake_driver("Old", H200_ATTRIBUTES | {"COMPUTE_CAPABILITY_MAJOR": 6}),
            "how fast Old computes is not known",
        ),
    ],
)
def test_without_a_gpu_the_choices_are_named(
    driver: ModuleType | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    with pytest.raises(
        InputError, match=rf"^--gpu: no GPU can be read here \({reason}\); name one of v100, .*ada6000$"
    ):
        nf("llama-3-8b")
