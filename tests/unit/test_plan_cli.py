"""``nf plan``: what it prints, and that every fault of a plan reaches the user as an InputError."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from plan_cases import LLAMA, MIXTRAL

from nf.cli import plan as command
from nf.cli.timeline import timeline
from nf.errors import InputError, ModelError
from nf.graphs.plan import NanoOperation, PipelinePlan, Stream, load_plan, nano_batch_plan, sequential_plan

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model directory; ``nf plan`` reads no more of it than its configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def nf(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="nf")
    command.add_parser(parser.add_subparsers(dest="command"))
    return command.run(parser.parse_args(["plan", *argv]))


def test_one_round_of_the_nano_batch_plan() -> None:
    """Streams beside each other, decode attention open for as long as nothing waits for it, then the waits."""
    operations = [op for op in LLAMA if op.name in ("qkv_proj", "rope_append", "decode_attention", "o_proj")]
    assert timeline(nano_batch_plan(operations, 256), operations) == (
        "Plan nano-batch: 256 tokens in 2 nano-batches on 2 streams\n"
        "  nano-batch 0: tokens [0, 128)\n"
        "  nano-batch 1: tokens [128, 256)\n"
        "Time runs downwards; │: may still run.\n"
        "\n"
        "One round (r); layer r-1 is the one before.\n"
        "\n"
        "  compute: all SMs                  memory: all SMs, priority -1\n"
        "  ───────────────────────────────   ───────────────────────────────\n"
        "  o_proj           [0, 128)   r-1   decode_attention [128, 256) r-1\n"
        "  qkv_proj         [0, 128)   r     │\n"
        "  rope_append      [0, 128)   r     │\n"
        "  o_proj           [128, 256) r-1   decode_attention [0, 128)   r\n"
        "  qkv_proj         [128, 256) r     │\n"
        "  rope_append      [128, 256) r     │\n"
        "\n"
        "Waits across streams (* for a step of an earlier round)\n"
        "  o_proj           [0, 128)   r-1  after  decode_attention [0, 128)   r-1 *\n"
        "  decode_attention [128, 256) r-1  after  rope_append      [128, 256) r-1 *\n"
        "  o_proj           [128, 256) r-1  after  decode_attention [128, 256) r-1\n"
        "  decode_attention [0, 128)   r    after  rope_append      [0, 128)   r\n"
    )


@pytest.mark.parametrize("operations", [LLAMA, MIXTRAL], ids=["dense", "experts"])
@pytest.mark.parametrize("num_layers", [None, 1, 12])
def test_a_timeline_fits_100_columns(operations: tuple[object, ...], num_layers: int | None) -> None:
    text = timeline(nano_batch_plan(operations, 8192), operations, num_layers)  # type: ignore[arg-type]
    assert max(map(len, text.splitlines())) <= 100
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_streams_that_do_not_fit_stand_below() -> None:
    ranges = tuple((n * 1024, n * 1024 + 1024) for n in range(4))
    streams = tuple(Stream(f"s{n}", tuple(NanoOperation(op.name, n) for op in LLAMA), sms=32) for n in range(4))
    loads = ((900, 1000), (800, 1200), (700, 1400))
    text = timeline(PipelinePlan("four", 4096, ranges, streams, model="m", gpu="g", loads=loads), LLAMA)
    assert "made for m on g" in text
    assert "about 900 tokens decode and see 1000 keys each, and 2 more loads" in text
    assert max(map(len, text.splitlines())) <= 100
    heads = [line.split() for line in text.splitlines() if "32 SMs" in line]
    assert [[word for word in line if word.startswith("s")] for line in heads] == [["s0:", "s1:"], ["s2:", "s3:"]]
    for n in range(4):
        assert sum(f"[{n * 1024}, " in part for part in text.split("Waits")[0].split("  ")) >= len(LLAMA)


def test_every_round_shows_each_layer_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert nf("show", "nano-batch", "--layers", "3", "--dense-batch-size", "64", "--model", model) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("Round")] == [f"Round {r}" for r in range(4)]
    columns = [part.split("Waits")[0] for part in out.split("Round")[1:]]
    for layer in range(3):
        assert sum(text.count(f"down_proj         [0, 32)  layer {layer}") for text in columns) == 1
        assert sum(text.count(f"decode_attention  [32, 64) layer {layer}") for text in columns) == 1


def test_the_batch_size_defaults_to_the_engines(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert nf("show", "sequential", "--model", model) == 0
    assert capsys.readouterr().out.startswith("Plan sequential: 2048 tokens in 1 nano-batch on 1 stream\n")


def test_json_output_is_a_plan_that_validates(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nf("show", "nano-batch", "--dense-batch-size", "64", "--json", "--model", model) == 0
    path = tmp_path / "mine.json"
    path.write_text(capsys.readouterr().out)
    assert load_plan(path, LLAMA) == nano_batch_plan(LLAMA, 64)
    assert nf("validate", str(path), "--model", model, "--gpu-sms", "132") == 0
    assert capsys.readouterr().out == (
        'valid: plan "nano-batch" runs 18 nano-operations per layer on 2 stream(s), 64 tokens in 2 nano-batch(es)\n'
    )
    assert nf("show", str(path), "--model", model) == 0
    assert capsys.readouterr().out.startswith("Plan nano-batch: 64 tokens")


def test_a_built_in_plan_validates(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert nf("validate", "sequential", "--model", model) == 0
    assert capsys.readouterr().out.endswith("on 1 stream(s), 2048 tokens in 1 nano-batch(es)\n")


def test_faults_are_input_errors(model: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    partitioned = sequential_plan(LLAMA, 8)
    stream = Stream("compute", partitioned.streams[0].nano_operations, sms=144)
    path.write_text(PipelinePlan("p", 8, ((0, 8),), (stream,)).to_json())
    with pytest.raises(InputError, match="asks for 144 SMs of a GPU that has 132"):
        nf("validate", str(path), "--model", model, "--gpu-sms", "132")
    with pytest.raises(InputError, match="is neither a file nor a built-in plan"):
        nf("show", "nano", "--model", model)
    with pytest.raises(InputError, match=r"^--layers: must be 1 to 1000, got 0"):
        nf("show", "sequential", "--model", model, "--layers", "0")
    with pytest.raises(InputError, match=r"^--gpu-sms: must be at least 1, got 0"):
        nf("validate", str(path), "--model", model, "--gpu-sms", "0")
    with pytest.raises(InputError, match=r"^--dense-batch-size: must be 1 to"):
        nf("show", "sequential", "--model", model, "--dense-batch-size", "0")
    with pytest.raises(ModelError):
        nf("show", "sequential", "--model", str(tmp_path / "gone"))


@pytest.mark.parametrize("argv", [["--help"], ["show", "--help"], ["validate", "--help"]])
def test_help_says_how_to_use_it(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        nf(*argv)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: nf plan" in out
    assert "nf plan show nano-batch" in out or "--model MODEL" in out
