"""Faults: what goes wrong is said in one sentence, and nobody else notices.

Every case on a real engine with a small random model, beside requests whose tokens must stay as they are without it.
Where a case is shown elsewhere, it stands here only in this table:

empty prompt, list, messages ............ e2e/test_bad_input.py
token id out of the vocabulary .......... e2e/test_bad_input.py
prompt + max_tokens > max_model_len ..... e2e/test_bad_input.py
caps of n, logprobs, lists .............. e2e/test_bad_input.py
numbers out of range, unknown names ..... e2e/test_bad_input.py; from files in unit/test_cli_prompts.py
stop string across tokens and bytes ..... e2e/test_bad_input.py; against a search in unit/test_detokenizer.py
very long word .......................... e2e/test_bad_input.py
special tokens in what users write ...... unit/test_chat_template.py: test_forged_…, test_raw_prompts_are_parsed
template that attacks ................... e2e/test_bad_input.py; unit/test_chat_template.py: test_nothing_escapes_…
safetensors malformed ................... unit/test_weights.py: test_malformed_file, test_truncated_file
index: missing shard, path outside ...... unit/test_weights.py: test_missing_shard, test_index_names_only_files_of_…
shape ≠ config, architecture, tokenizer . e2e/test_llm.py: test_models_that_cannot_be_used, test_missing_tokenizer_…
KV pool exhausted ....................... e2e/test_llm.py: test_small_pools_…; e2e/test_properties.py
one request that never fits ............. here
abort at any moment ..................... unit/test_engine.py: test_abort_at_every_stage_…; e2e/test_properties.py
out of memory at load ................... here; every size in unit/test_memory_budget.py
kernel failure .......................... here; resuming after it in unit/test_cli_generate.py: test_a_failed_engine_…
SIGTERM, Ctrl-C twice, parent gone ...... here; e2e/test_cli.py: test_ctrl_c_…, test_a_second_ctrl_c_…, test_a_reader_…
batch file .............................. here; kill −9 in e2e/test_cli.py: test_killed_and_resumed_…
days of random add, abort, preempt ...... here
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from neighbours import NEIGHBOURS, beside_neighbours, last, refused, tokens, undisturbed, until
from small_models import write_model

from nf import LLM, AsyncLLM, EngineError, InputError, SamplingParams
from nf.cli.main import main
from nf.executors.cpu_operations import OPERATIONS


@pytest.fixture
def hopeful_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are expected to be short, so that memory runs out later and sequences are preempted."""
    monkeypatch.setattr("nf.scheduler.memory.PRIOR_OUTPUT_LEN", 3.0)


@pytest.mark.usefixtures("hopeful_admission")
def test_request_that_never_fits(model_dir: Path) -> None:
    """One request that can never fit fails alone, also where the others are short of memory; no livelock."""
    sentence = (
        "max_tokens: prompt (3 tokens) plus max_tokens (400) needs 101 KV pages of 4 tokens, but there are only 100"
    )

    async def fault(llm: AsyncLLM) -> None:
        await refused(llm, "abc", sentence, {"max_tokens": 400})

    beside_neighbours(model_dir, fault, page_size=4, num_pages=100)
    with LLM(model_dir, page_size=4, num_pages=100) as llm:
        good, bad = llm.generate(["import os", "abc"], [NEIGHBOURS[1][1], SamplingParams(max_tokens=400)])
    assert tokens(good) == undisturbed(model_dir)[1]
    assert (bad.outputs[0].finish_reason, bad.error) == ("error", sentence)


def test_out_of_memory_at_load(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of memory at load: needed against free in the message, exit code not 0."""
    command = ["generate", str(model_dir), "-p", "x"]
    monkeypatch.setattr("nf.backends.free_ram", lambda: 3 << 15)
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"nf generate: {model_dir}: its weights need 0.1 MiB in float32, and 0.1 MiB are free\n"
    )
    monkeypatch.setattr("nf.backends.free_ram", lambda: 1 << 30)
    monkeypatch.setattr("nf.memory_budget.free_ram", lambda: 600_000)
    assert main(command) == 2
    sentence = (
        "nf generate: --max-model-len: tables for 512 positions of 256 sequences need 0.5 MiB, and 0.4 MiB are free"
    )
    assert capsys.readouterr().err.startswith(sentence)


@pytest.fixture
def failing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """down_proj fails when it is called for the hundredth time."""
    calls = iter(range(100))
    works = OPERATIONS["down_proj"]

    def fails(*args: Any) -> None:
        if next(calls, None) is None:
            raise RuntimeError("an illegal memory access was met in down_proj")
        works(*args)

    monkeypatch.setattr("nf.executors.cpu.OPERATIONS", {**OPERATIONS, "down_proj": fails})


@pytest.mark.usefixtures("failing_kernel")
def test_kernel_failure(model_dir: Path) -> None:
    """A kernel fails: every request in flight gets the error, the engine refuses more work, the process can exit."""
    before = handles()

    async def run() -> None:
        async with AsyncLLM(model_dir) as llm:
            running = [last(llm, prompt, params) for prompt, params in NEIGHBOURS]
            errors = await asyncio.gather(*running, return_exceptions=True)
            for error in errors:
                assert isinstance(error, EngineError)
                assert str(error) == "the engine failed: an illegal memory access was met in down_proj"
                assert isinstance(error.__cause__, RuntimeError)
            assert llm.num_requests == 0
            with pytest.raises(EngineError, match=r"^the engine has failed and takes no more requests: an illegal "):
                await last(llm, "a", NEIGHBOURS[0][1])
        await until(lambda: threading.active_count() == before[0])  # idle threads take a moment

    asyncio.run(asyncio.wait_for(run(), 20))
    assert handles() == before


@pytest.mark.usefixtures("failing_kernel")
def test_kernel_failure_in_a_batch(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same from the command line: exit code 1, the sentence, and what was finished before is kept."""
    out = tmp_path / "out.jsonl"
    prompts = [arg for i in range(40) for arg in ("-p", f"prompt {i}")]
    options = ["--output", str(out), "--max-tokens", "10", "--ignore-eos", "--max-num-seqs", "2"]
    assert main(["generate", str(model_dir), *prompts, *options, "--quiet"]) == 1
    err = capsys.readouterr().err  # of a request in flight, or of one that came just after
    assert err.startswith(("nf generate: the engine failed: ", "nf generate: the engine has failed and takes no more "))
    assert err.endswith(": an illegal memory access was met in down_proj\n")
    kept = read_records(out)
    assert 0 < len(kept) < 40
    assert all(len(record["outputs"]) == 1 and record["error"] is None for record in kept)


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []


def batch_command(model_dir: Path, folder: Path, lines: list[Any], *options: str) -> list[str]:
    """`nf generate` on a file of these lines, two at a time."""
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    files = ["--prompts-file", str(prompts), "--output", str(folder / "out.jsonl")]
    sampling = ["--max-tokens", "40", "--ignore-eos", "--temperature", "1", "--token-ids", "--max-num-seqs", "2"]
    return ["generate", str(model_dir), *files, *sampling, *options]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_let_requests_in_flight_end(model_dir: Path, tmp_path: Path, signum: int, code: int) -> None:
    """SIGTERM, or SIGHUP because the parent's terminal has gone: drain, write what is done, end."""
    lines = [{"prompt": f"prompt {i}"} for i in range(3000)]
    command = [sys.executable, "-m", "nf.cli", *batch_command(model_dir, tmp_path / "stopped", lines)]
    before = signal.signal(signum, signal.SIG_DFL)  # a child inherits what is ignored, as SIGHUP is under nohup
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signum, before)
    deadline = time.monotonic() + 60
    while len(read_records(tmp_path / "stopped" / "out.jsonl")) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, ""), err
    written = read_records(tmp_path / "stopped" / "out.jsonl")
    assert "nf generate: stopping; requests in flight get 10 s\n" in err
    assert f"nf generate: stopped; {len(written)} results kept in" in err
    assert "Traceback" not in err
    assert sorted(record["index"] for record in written) == list(range(len(written)))  # none in flight was dropped
    assert main(batch_command(model_dir, tmp_path / "whole", lines[:4], "--quiet")) == 0
    assert [r for r in sorted(written, key=index_of) if r["index"] < 4] == sorted(
        read_records(tmp_path / "whole" / "out.jsonl"), key=index_of
    )[: len(written)]


def index_of(record: dict[str, Any]) -> int:
    index: int = record["index"]
    return index


def test_draining_has_a_deadline(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests that take longer than the deadline are given up."""
    monkeypatch.setattr("nf.cli.batch.DRAIN_SECONDS", 0.01)
    steps = iter(range(30))
    works = OPERATIONS["down_proj"]

    def slow(*args: Any) -> None:
        if next(steps, None) == 29:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.002)
        works(*args)

    monkeypatch.setattr("nf.executors.cpu.OPERATIONS", {**OPERATIONS, "down_proj": slow})
    command = ["generate", str(model_dir), "-p", "x", "--json", "--max-tokens", "500", "--ignore-eos"]
    assert main(command) == 143
    out, err = capsys.readouterr()
    assert out == ""
    assert "stopped; 0 requests were finished" in err


def test_batch_file_with_bad_lines(model_dir: Path, tmp_path: Path) -> None:
    """A bad line and a custom_id used twice: an error of that line alone, the others have their own results."""
    good: list[Any] = [{"custom_id": f"job {i}", "prompt": f"prompt {i}", "seed": i} for i in range(6)]
    bad = {
        "{bad": "line: is not valid JSON (Expecting property name enclosed in double quotes at character 2)",
        '{"prompt": ""}': "prompt: is empty; give at least one character",
        '{"prompt": "x", "custom_id": "job 1"}': "custom_id: 'job 1' was already used in line 3",
        '{"prompt": "x", "top_k": 99999999999}': "top_k: must be between -1 and 2147483647, not 99999999999",
        '{"prompt_token_ids": [1, 260]}': "prompt.prompt_token_ids[1]: token id 260 is not in [0, 260)",
        '{"messages": [{"role": "user"}]}': (
            'messages[0].content: must be a text or a list of {"type": "text", "text": …}'
        ),
    }
    mixed = [line for pair in zip(good, bad, strict=True) for line in pair]
    assert main(batch_command(model_dir, tmp_path / "good", good, "--quiet")) == 0
    assert main(batch_command(model_dir, tmp_path / "mixed", mixed, "--quiet")) == 1
    expected = {r["custom_id"]: r["outputs"] for r in read_records(tmp_path / "good" / "out.jsonl")}
    found = read_records(tmp_path / "mixed" / "out.jsonl")
    assert {r["custom_id"]: r["outputs"] for r in found if not r["error"]} == expected
    assert len(expected) == 6
    assert [r["error"] for r in sorted(found, key=index_of) if r["error"]] == list(bad.values())


def test_nothing_is_left_after_close(model_dir: Path) -> None:
    """Threads, files and the process of the chat template go with the engine, not with its last reference."""
    before = handles()
    llm = LLM(model_dir)
    llm.generate("a", SamplingParams(max_tokens=3))
    llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=3))
    assert handles() != before
    llm.close()
    assert handles() == before
    for use in (lambda: llm.generate("a"), lambda: llm.chat([{"role": "user", "content": "Hi"}])):
        with pytest.raises(EngineError, match=r"^the engine is closed$"):
            use()
    assert handles() == before


def handles() -> tuple[int, int, int]:
    """Threads, open files and child processes."""
    gc.collect()
    children = sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))
    return threading.active_count(), len(os.listdir("/proc/self/fd")), children


def memory() -> tuple[int, int]:
    """Blocks that Python has allocated, and bytes the process has in RAM."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.usefixtures("hopeful_admission")
def test_days_of_random_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random add, abort, preempt: memory, file descriptors, threads and free pages come back to the baseline."""
    monkeypatch.setattr("nf.scheduler.memory.WINDOW", 1 << 30)
    monkeypatch.setattr("nf.scheduler.memory.PRIOR_WEIGHT", 1 << 30)  # hopes that experience does not change
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model_dir = write_model(tmp_path / "tiny", intermediate_size=8, **sizes)
    rng = random.Random(0)

    async def one(llm: AsyncLLM, number: int) -> None:
        """A request that runs to its end, or is left, aborted, cancelled or refused after a few outputs."""
        extras: list[dict[str, Any]] = [
            {},
            {"stop": ["z", "qx"]},
            {"logprobs": 2},
            {"prompt_logprobs": 1},
            {"top_k": 5},
        ]
        params = SamplingParams(
            seed=number, max_tokens=rng.randint(1, 20), n=rng.choice([1, 1, 1, 3]), **rng.choice(extras)
        )
        way, most = rng.choice(["whole", "stream", "leave", "abort", "cancel", "wrong"]), rng.randint(1, 6)
        prompt = "" if way == "wrong" else "ab" * rng.randint(1, 12)
        outputs = llm.generate(prompt, params, f"r{number}", stream=way != "whole")
        seen = 0
        try:
            async for _ in outputs:
                seen += 1
                if seen == most and way == "leave":
                    break
                if seen == most and way == "abort":
                    await llm.abort(f"r{number}")
                if seen == most and way == "cancel":
                    raise asyncio.CancelledError
        except InputError:
            assert way == "wrong"
        except asyncio.CancelledError:
            assert way == "cancel"
        finally:
            await outputs.aclose()

    async def some(llm: AsyncLLM, numbers: range) -> None:
        """Requests, up to 16 at a time."""
        remaining = iter(numbers)

        async def one_after_another() -> None:
            for number in remaining:
                await one(llm, number)

        await asyncio.gather(*(one_after_another() for _ in range(16)))
        await until(lambda: llm.num_requests == 0 and not llm.loaded.scheduler.has_work)

    async def run() -> None:
        sizes = {"max_num_seqs": 12, "max_num_batched_tokens": 32, "page_size": 4}
        async with AsyncLLM(model_dir, num_pages=40, num_host_pages=4, **sizes) as llm:
            scheduler = llm.loaded.scheduler
            witness = await last(llm, "witness", SamplingParams(seed=5, max_tokens=30))
            await some(llm, range(300))
            before, (blocks, resident) = handles(), memory()
            await some(llm, range(300, 1500))
            assert handles() == before
            more_blocks, more_resident = (now - then for now, then in zip(memory(), (blocks, resident), strict=True))
            assert more_blocks < 2 * 1200  # of Python's own caches; two per request would be a leak
            assert more_resident < 8 << 20
            scheduler.check()
            assert (scheduler.num_free_pages, scheduler.num_free_host_pages) == (40, 4)
            assert scheduler.counters.swapped > 10
            assert scheduler.counters.recomputed > 10
            assert tokens(await last(llm, "witness", SamplingParams(seed=5, max_tokens=30))) == tokens(witness)

    asyncio.run(asyncio.wait_for(run(), 120))
