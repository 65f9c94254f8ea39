"""`nf bench throughput` and `nf bench latency` on the bundled model, from the command line to the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nf.cli import main

SMALL = ["--num-prompts", "4", "--input-len", "24", "--output-len", "6", "--device", "cpu", "--quiet"]
SUMMARIES = ("ttft", "tpot", "latency", "normalized_latency")


def bench(*args: str) -> int:
    return main(["bench", *args])


def check_head(record: dict[str, Any], benchmark: str) -> None:
    assert record["benchmark"] == benchmark
    assert record["model"] == "nf-tiny"
    assert record["architecture"] == "LlamaForCausalLM"
    assert record["options"]["device"] == "cpu"
    assert record["options"]["max_num_batched_tokens"] == 64
    assert record["environment"].keys() == {"date", "commit", "versions", "platform", "cpu", "gpus", "driver"}
    assert record["environment"]["versions"]["nf"]


def check_summaries(results: dict[str, Any]) -> None:
    for name in SUMMARIES:
        assert results[name].keys() == {"mean", "p50", "p90", "p99"}
        assert 0 < results[name]["p50"] <= results[name]["p90"] <= results[name]["p99"]


def test_throughput_from_command_to_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, timeline = tmp_path / "record.json", tmp_path / "step.json"
    files = ["--json", str(file), "--trace-out", str(timeline)]
    assert bench("throughput", *SMALL, "--max-num-batched-tokens", "64", *files) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = {line[:16].strip(): line[16:] for line in printed.out.splitlines()}
    assert rows["run"] == "nf-tiny on cpu, plan sequential, 4 requests of 24 in / 6 out"
    assert [rows[name] for name in ("energy", "Eq. 5", "power roofline")] == ["-"] * 3  # there is no GPU to ask

    record = json.loads(file.read_text())
    check_head(record, "throughput")
    assert record["workload"] == {
        "name": "24 in / 6 out", "requests": 4, "input_tokens": 96, "output_tokens": 24, "seed": 0,
    }  # fmt: skip
    results = record["results"]
    check_summaries(results)
    rates = results["tokens_per_second"]
    assert rates["total"] == pytest.approx(120 / results["seconds"])
    assert rates["input"] == pytest.approx(4 * rates["output"])
    assert results["requests_per_second"] == pytest.approx(4 / results["seconds"])
    assert results["latency"]["p99"] <= results["seconds"]
    assert results["steady"]["total"] == pytest.approx(results["steady"]["input"] + results["steady"]["output"])
    assert results["steps"]["count"] >= 6  # an output token is a step
    assert results["steps"]["count"] * results["steps"]["mean_tokens"] >= 96 + 4 * 5
    assert (results["joules_per_token"], results["watts"], results["ceilings"]) == (None, None, None)
    assert results["sm_megahertz"] is None
    assert results["memory"]["gpu"] is None
    assert results["memory"]["host"] > 50 << 20
    startup = results["startup"]
    parts = sum(seconds for name, seconds in startup.items() if name not in ("total", "first_token"))
    assert startup["total"] == pytest.approx(parts)
    assert startup["first_token"] > startup["total"]
    assert f"{rates['total']:,.1f} tokens/s" in rows["throughput"]

    step = results["step"]
    assert sum(row["seconds"] for row in step["operations"]) == pytest.approx(step["seconds"])
    assert f"One step of {step['tokens']} tokens" in printed.out
    events = json.loads(timeline.read_text())["traceEvents"]
    assert sum(event["name"].startswith("gate_up_proj") for event in events) == 6  # layers


def test_latency_from_command_to_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    options = ["--request-rate", "20", "400", "--max-num-batched-tokens", "64", "--json", str(file)]
    assert bench("latency", *SMALL, *options) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert len(lines) == 5  # what was run, two lines of headings, two rates
    assert [float(line.split()[0]) for line in lines[3:]] == [20.0, 400.0]

    record = json.loads(file.read_text())
    check_head(record, "latency")
    slow, fast = record["results"]["rates"]
    for rate in (slow, fast):
        check_summaries(rate)
        assert rate["achieved_rate"] == pytest.approx(4 / rate["seconds"])
        assert rate["normalized_latency"]["mean"] == pytest.approx(rate["latency"]["mean"] / 6)
    assert (slow["request_rate"], fast["request_rate"]) == (20.0, 400.0)
    assert fast["achieved_rate"] < 400


def test_lengths_from_a_trace(tmp_path: Path) -> None:
    trace, file = tmp_path / "chat.csv", tmp_path / "record.json"
    trace.write_text("ContextTokens,GeneratedTokens\n" + "".join(f"{8 + n},{1 + n}\n" for n in range(9)) + "5,5000\n")
    options = ["--trace", str(trace), "--max-total-len", "20", "--num-prompts", "4", "--seed", "3", "--quiet"]
    assert bench("throughput", *options, "--device", "cpu", "--detokenize", "--json", str(file)) == 0
    workload = json.loads(file.read_text())["workload"]
    assert (workload["name"], workload["requests"], workload["seed"]) == ("chat.csv", 4, 3)
    assert workload["input_tokens"] - workload["output_tokens"] == 4 * 7
    assert workload["input_tokens"] + workload["output_tokens"] <= 4 * 20


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["throughput", "--num-prompts", "0"], "--num-prompts: must be at least 1, not 0"),
        (["throughput", "--seed", "-1"], "--seed: must be at least 0, not -1"),
        (["throughput", "--trace", "/nowhere.csv"], "/nowhere.csv: cannot be read"),
        (["throughput", "--trace", "x.csv", "--input-len", "4"], "--input-len: cannot be used with --trace"),
        (["throughput", "--max-total-len", "4"], "--max-total-len: is for lengths from --trace FILE"),
        (["throughput", "--json", "/no/such/folder/x"], "--json: /no/such/folder/x cannot be written"),
        (["throughput", "--shape", "llama-3-8b"], "--shape: names a model without weights; add --random-weights"),
        (
            ["throughput", "x", "--shape", "llama-3-8b", "--random-weights"],
            "--shape: is the model to measure, and so is x",
        ),
        (["throughput", "--input-len", "1020", "--output-len", "5"], "--max-model-len: 1024 tokens, and the longest"),
        (["throughput", ""], "model: must be a directory, a bundled model's name or a hub name, not ''"),
        (["throughput", "--shape", "", "--random-weights"], "model: with random weights a model is"),
        (["throughput", "--num-pages", "0"], "--num-pages: must be an integer of at least 1, not 0"),
        (["throughput", "--random-weights", "--shape", "llama-3"], "llama-3: with random weights a model is"),
        (["latency", "--request-rate", "1", "0"], "--request-rate: must be above 0, not 0"),
        (["latency", "--request-rate", "nan"], "--request-rate: must be above 0, not nan"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*args) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"nf bench {args[0]}: {said}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_misspelt_option_is_answered_by_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench("latency", "--request-rate", "1", "--num-promts", "4")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "nf bench latency: --num-promts: unknown option; did you mean --num-prompts?\n"
