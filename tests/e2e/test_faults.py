"""Bad input and faults: what goes wrong is said in one sentence, and nobody else notices.

Every case on a real engine with a small random model, beside requests whose tokens must stay as they are without it.
Where a case is shown elsewhere, it stands here only in this table:

empty prompt, list, messages ............ here
token id out of the vocabulary .......... here
prompt + max_tokens > max_model_len ..... here
caps of n, logprobs, lists .............. here
numbers out of range, unknown names ..... here; from files in unit/test_cli_prompts.py
stop string across tokens and bytes ..... here; against a search in the whole text in unit/test_detokenizer.py
very long word .......................... here
special tokens in what users write ...... unit/test_chat_template.py: test_forged_…, test_raw_prompts_are_parsed
template that attacks ................... here; every trick in unit/test_chat_template.py: test_nothing_escapes_…
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
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from small_models import write_model

from nf import LLM, AsyncLLM, EngineError, InputError, RequestOutput, SamplingParams
from nf.cli.main import main
from nf.executors.cpu_operations import OPERATIONS

MAX_MODEL_LEN = 512
VOCAB_SIZE = 260
NEIGHBOURS: list[tuple[str, SamplingParams]] = [
    ("def read_lines(path):", SamplingParams(seed=1, max_tokens=150, ignore_eos=True)),
    ("import os", SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)),
    ("x" * 100, SamplingParams(seed=2, n=2, top_p=0.9, max_tokens=150, ignore_eos=True)),
    ("naïve 🙂", SamplingParams(seed=3, repetition_penalty=1.2, max_tokens=150, ignore_eos=True, logprobs=1)),
]

Fault = Callable[[AsyncLLM], Awaitable[None]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small", max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture
def hopeful_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are expected to be short, so that memory runs out later and sequences are preempted."""
    monkeypatch.setattr("nf.scheduler.memory.PRIOR_OUTPUT_LEN", 3.0)


async def last(llm: AsyncLLM, prompt: Any, params: SamplingParams, **how: Any) -> RequestOutput:
    outputs = [output async for output in llm.generate(prompt, params, **how)]
    return outputs[-1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@cache
def undisturbed(model_dir: Path) -> list[list[list[int]]]:
    """Tokens of each neighbour that has an engine for itself."""
    with LLM(model_dir) as llm:
        return [tokens(llm.generate(prompt, params)[0]) for prompt, params in NEIGHBOURS]


def beside_neighbours(model_dir: Path, fault: Fault, **options: Any) -> None:
    """Let ``fault`` happen while the neighbours decode; they come to the same tokens, and every page is free again."""

    async def run() -> list[RequestOutput]:
        async with AsyncLLM(model_dir, **{"max_num_seqs": 16, "max_num_batched_tokens": 64} | options) as llm:
            scheduler = llm.loaded.scheduler
            free = (scheduler.num_free_pages, scheduler.num_free_host_pages)
            tasks = [asyncio.create_task(last(llm, prompt, params)) for prompt, params in NEIGHBOURS]
            await until(lambda: llm.stats.output_tokens > len(NEIGHBOURS))
            assert llm.num_requests == len(NEIGHBOURS)
            await fault(llm)
            outputs = await asyncio.gather(*tasks)
            await until(lambda: not scheduler.has_work)
            scheduler.check()
            assert (scheduler.num_free_pages, scheduler.num_free_host_pages) == free
            assert llm.num_requests == 0
            return outputs

    assert [tokens(output) for output in asyncio.run(run())] == undisturbed(model_dir)


async def refused(llm: AsyncLLM, prompt: Any, message: str, params: dict[str, Any] | None = None) -> None:
    """The request ends with exactly this sentence before it has run a step."""
    requests = llm.stats.requests
    with pytest.raises(InputError) as error:
        await last(llm, prompt, SamplingParams.from_dict(params or {}))
    assert str(error.value) == message
    assert llm.stats.requests == requests


def test_empty_input(model_dir: Path) -> None:
    """Empty prompt, empty list, empty messages: an error."""

    async def fault(llm: AsyncLLM) -> None:
        await refused(llm, "", "prompt: is empty; give at least one character")
        await refused(llm, [], "prompt: is empty; give at least one token")
        await refused(llm, {"prompt_token_ids": []}, "prompt.prompt_token_ids: is empty; give at least one token")
        await refused(llm, {}, "prompt: must hold prompt_token_ids or prompt, and holds []")
        with pytest.raises(InputError, match=r"^messages: must be a list of at least one mapping with role and con"):
            await anext(llm.chat([]))

    beside_neighbours(model_dir, fault)
    with LLM(model_dir) as llm, pytest.raises(InputError, match=r"^prompts: is empty; give at least one prompt$"):
        llm.generate([])


def test_token_id_out_of_the_vocabulary(model_dir: Path) -> None:
    """A token id below 0 or not below the vocabulary size: an error before execution."""

    async def fault(llm: AsyncLLM) -> None:
        for token_id in (-1, VOCAB_SIZE, 2**31, 10**30):
            await refused(llm, [5, token_id], f"prompt[1]: token id {token_id} is not in [0, {VOCAB_SIZE})")
        await refused(llm, [5, 5.0], "prompt[1]: must be a token id, not 5.0")
        await refused(llm, b"ab", "prompt: must be a text, a list of token ids or a mapping, not bytes")

    beside_neighbours(model_dir, fault)


def test_longer_than_the_model(model_dir: Path) -> None:
    """prompt + max_tokens > max_model_len: an error with both numbers, never silent truncation."""

    async def fault(llm: AsyncLLM) -> None:
        sentence = "prompt: 500 prompt tokens + max_tokens 13 = 513, more than the model length 512"
        await refused(llm, "a" * 500, sentence, {"max_tokens": 13})
        sentence = "prompt: 512 tokens leave no room for output in the model length 512"
        await refused(llm, [7] * 512, sentence, {"max_tokens": None})
        sentence = "min_tokens: 13 exceeds the 12 tokens left"
        await refused(llm, "a" * 500, sentence, {"max_tokens": None, "min_tokens": 13})
        output = await last(llm, "a" * 500, SamplingParams(max_tokens=12, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 12

    beside_neighbours(model_dir, fault)


def test_beyond_a_cap(model_dir: Path) -> None:
    """n, best_of, logprobs, stop lists, logit_bias beyond a stated cap: an error before fan-out."""
    many = list(range(1025))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n": 129}, "n: must be between 1 and 128, not 129"),
        ({"n": 17}, "n: must be at most max_num_seqs = 16, not 17"),
        ({"best_of": 2}, "best_of: is not a sampling parameter"),
        ({"logprobs": 21}, "logprobs: must be between 0 and 20, not 21"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: must be between 0 and 20, not 21"),
        ({"stop": ["a"] * 17}, "stop: takes at most 16 strings, not 17"),
        ({"stop": "a" * 1025}, "stop: takes strings of at most 1024 characters, not 1025"),
        ({"bad_words": ["a"] * 129}, "bad_words: takes at most 128 strings, not 129"),
        ({"stop_token_ids": many}, "stop_token_ids: takes at most 1024 token ids, not 1025"),
        ({"allowed_token_ids": many}, "allowed_token_ids: takes at most 1024 token ids, not 1025"),
        ({"logit_bias": dict.fromkeys(many, 1.0)}, "logit_bias: takes at most 1024 token ids, not 1025"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias: token id 260 is not in [0, 260)"),
    ]

    async def fault(llm: AsyncLLM) -> None:
        for params, sentence in cases:
            await refused(llm, "a", sentence, params)

    beside_neighbours(model_dir, fault)


def test_number_out_of_range(model_dir: Path) -> None:
    """NaN, infinite or negative temperature, top_p 0, top_k −5, an unknown parameter: an error."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": float("nan")}, "temperature: must be in [0, 2], not nan"),
        ({"temperature": float("inf")}, "temperature: must be in [0, 2], not inf"),
        ({"temperature": -0.1}, "temperature: must be in [0, 2], not -0.1"),
        ({"temperature": 10**400}, f"temperature: must be in [0, 2], not {10**58}…"),
        ({"temperature": "1"}, "temperature: must be a number, not '1'"),
        ({"top_p": 0}, "top_p: must be in (0, 1], not 0"),
        ({"top_k": -5}, "top_k: must be between -1 and 2147483647, not -5"),
        ({"top_k": 2**31}, "top_k: must be between -1 and 2147483647, not 2147483648"),
        ({"top_k": True}, "top_k: must be an integer, not True"),
        ({"min_p": 1.5}, "min_p: must be in [0, 1], not 1.5"),
        ({"presence_penalty": 3}, "presence_penalty: must be in [-2, 2], not 3"),
        ({"repetition_penalty": 0}, "repetition_penalty: must be in (0, 2], not 0"),
        ({"seed": 2**64}, "seed: must be between 0 and 18446744073709551615, not 18446744073709551616"),
        ({"max_tokens": 0}, "max_tokens: must be between 1 and 2147483647, not 0"),
        ({"max_tokens": 10**5000}, "max_tokens: must be between 1 and 2147483647, not <int that cannot be shown>"),
        ({"logit_bias": {65: 10**400}}, f"logit_bias: must be in [-100, 100], not {10**58}…"),
        ({"logit_bias": {"9" * 5000: 1}}, f"logit_bias: must be an integer, not '{'9' * 58}…"),
        ({"stop": "a\ud800"}, "stop: must hold Unicode text, not half of a surrogate pair as in 'a\\ud800'"),
        ({"bad_words": ["\udfff"]}, "bad_words: must hold Unicode text, not half of a surrogate pair as in '\\udfff'"),
        ({"tempurature": 1}, "tempurature: is not a sampling parameter; did you mean temperature?"),
    ]

    async def fault(llm: AsyncLLM) -> None:
        for params, sentence in cases:
            await refused(llm, "a", sentence, params)
        for extreme in ({"top_k": 2**31 - 1}, {"temperature": 5e-324}, {"top_p": 5e-324}, {"seed": 2**64 - 1}):
            output = await last(llm, "a", SamplingParams(max_tokens=4, ignore_eos=True, **extreme))
            assert output.outputs[0].finish_reason == "length"

    beside_neighbours(model_dir, fault)


@pytest.mark.parametrize("letters", ["abc", "é"], ids=["across tokens", "inside a character"])
def test_stop_string_is_cut_exactly(model_dir: Path, letters: str) -> None:
    """A stop string that spans tokens, or begins inside a multi-byte character: cut exactly."""
    params = SamplingParams(seed=9, max_tokens=80, allowed_token_ids=list(letters.encode()))
    with LLM(model_dir) as llm:
        whole = llm.generate("a", params)[0].outputs[0].text
    stop = whole[30:33] if letters == "abc" else "éé"
    expected = whole[: whole.index(stop)]  # of bytes, two or more make up the stop string

    async def fault(llm: AsyncLLM) -> None:
        shown = [output.outputs[0] async for output in llm.generate("a", params.with_(stop=[stop]))]
        assert (shown[-1].text, shown[-1].finish_reason, shown[-1].stop_reason) == (expected, "stop", stop)
        assert all(expected.startswith(part.text) for part in shown)

    beside_neighbours(model_dir, fault)


def test_very_long_word(model_dir: Path) -> None:
    """A very long single-word prompt: the length cap comes first, and tokenizing never blocks the event loop."""

    async def fault(llm: AsyncLLM) -> None:
        sentence = "prompt: 10000000 bytes of text are at least 1428572 tokens, more than the model length 512"
        await refused(llm, "a" * 10_000_000, sentence)
        on_loop, tokenizer = threading.get_ident(), llm.loaded.tokenizer
        assert tokenizer is not None
        word, used, encode = "a" * 480, list[int](), tokenizer.encode

        def noted(text: str, **how: Any) -> list[int]:
            if text == word:  # a neighbour's log-probabilities encode a single letter, once
                used.append(threading.get_ident())
            return encode(text, **how)

        tokenizer.encode = noted  # type: ignore[method-assign]
        output = await last(llm, word, SamplingParams(max_tokens=2, ignore_eos=True))
        assert len(output.prompt_token_ids) == 480
        assert used
        assert on_loop not in used

    beside_neighbours(model_dir, fault)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ messages.__class__ }}", "'{{ messages.__class__ }}' reaches for a Python internal"),
        ("{% import 'os' as os %}", "template not found"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "engine ran out of fuel"),
    ],
    ids=["attribute", "import", "endless loop"],
)
def test_template_that_attacks(model_dir: Path, template: str, sentence: str) -> None:
    """A template that tries attribute access, imports or endless loops: an error in bounded time."""

    async def fault(llm: AsyncLLM) -> None:
        with pytest.raises(InputError) as error:
            await anext(llm.chat([{"role": "user", "content": "Hi"}]))
        assert str(error.value).startswith("chat_template: cannot be rendered: ")
        assert sentence in str(error.value)

    beside_neighbours(model_dir, fault, chat_template=template)


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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
