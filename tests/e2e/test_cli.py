"""`nf` as a process, on the bundled model: streams, exit codes, being killed, interrupted and cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NF = [sys.executable, "-m", "nf.cli"]


def nf(*args: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*NF, *args], check=False, capture_output=True, text=True, timeout=120, **how)


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*NF, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_results(process: subprocess.Popen[str], path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while count_lines(path) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def batch(folder: Path, count: int) -> list[str]:
    """A command of ``count`` prompts, two at a time, so that it can be interrupted half-way."""
    prompts = folder / "prompts.jsonl"
    lines = [{"custom_id": f"job {i}", "prompt": f"def function_{i}("} for i in range(count)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--max-num-seqs", "2", "--max-tokens", "24", "--ignore-eos", "--temperature", "1", "--seed", "7"]
    return ["generate", "--prompts-file", str(prompts), "--output", str(folder / "out.jsonl"), *options]


def test_text_on_stdout_and_the_rest_on_stderr() -> None:
    command = ["generate", "-p", "def read_lines(path):", "--max-tokens", "12", "--seed", "0"]
    streamed, whole = nf(*command), nf(*command, "--no-stream", "--quiet")
    assert (streamed.returncode, whole.returncode) == (0, 0), streamed.stderr
    assert streamed.stdout.strip()
    assert streamed.stdout == whole.stdout
    assert streamed.stderr.startswith("nf generate: 1 request in ")
    assert "TTFT" in streamed.stderr
    assert whole.stderr == ""


def test_prompts_from_a_pipe_with_one_bad_line() -> None:
    lines = 'import os\n{"prompt": "x", "tempurature": 1}\n{"prompt_token_ids": [-1]}\n{"prompt": "class", "n": 2}\n'
    done = nf("generate", "--prompts-file", "-", "--json", "--logprobs", "1", "--max-tokens", "4", input=lines)
    assert done.returncode == 1
    good, misspelt, negative, two = sorted(
        (json.loads(line) for line in done.stdout.splitlines()), key=lambda r: r["index"]
    )
    assert good["error"] is None
    assert good["usage"]["completion_tokens"] == len(good["outputs"][0]["logprobs"]) <= 4
    assert "did you mean temperature" in misspelt["error"]
    assert "-1" in negative["error"]
    assert len(two["outputs"]) == 2


def test_killed_and_resumed_gives_each_result_once_and_the_same_as_undisturbed(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    command, out = batch(tmp_path / "killed", 10), tmp_path / "killed" / "out.jsonl"
    process = start(*command)
    wait_for_results(process, out, 3)
    process.kill()
    process.communicate()
    kept = records(out)
    assert 3 <= len(kept) < 10
    with out.open("ab") as file:
        file.write(b'{"index": 9, "custom_id": "jo')  # what a write cut short leaves
    resumed = nf(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert f"holds {len(kept)} results" in resumed.stderr
    assert nf(*batch(tmp_path / "whole", 10)).returncode == 0
    found = {r["custom_id"]: r for r in records(out)}
    assert len(found) == len(records(out)) == 10
    assert found == {r["custom_id"]: r for r in records(tmp_path / "whole" / "out.jsonl")}


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    process = start(*batch(tmp_path, 2000))
    wait_for_results(process, tmp_path / "out.jsonl", 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert f"stopped; {len(records(tmp_path / 'out.jsonl'))} results kept" in err
    assert "Traceback" not in err


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    process = start(*batch(tmp_path, 2000))
    wait_for_results(process, tmp_path / "out.jsonl", 1)
    process.send_signal(signal.SIGTERM)  # would let the requests in flight end
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (130, 143)


def test_a_reader_that_leaves_ends_the_run_quietly() -> None:
    process = start("generate", "-p", "def f(", "--max-tokens", "400", "--ignore-eos")
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert err == ""


def test_errors_are_one_sentence_and_a_code(tmp_path: Path) -> None:
    for args, code, said in (
        (["generate", "-p", "x", "--max-tokens", "1000000"], 1, "max_tokens 1000000"),
        (["generate", str(tmp_path), "-p", "x"], 2, "config.json"),
        (["generate", "/missing", "-p", "x"], 2, "/missing"),
        (["generate", "-p", "x", "--plan", "nothing"], 2, "nothing"),
    ):
        done = nf(*args, "--quiet")
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("nf generate: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_closed_streams_are_nobody_listening() -> None:
    command = [*NF, "generate", "-p", "def f(", "--max-tokens", "4"]
    for closed in (">&-", "2>&-", ">&- 2>&- <&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, check=False, timeout=60
        )
        assert done.returncode == 0
        assert b"Traceback" not in done.stderr
        assert bool(done.stdout) == (closed == "2>&-")


def test_info() -> None:
    done = nf("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nf-tiny" in done.stdout
