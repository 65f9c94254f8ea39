"""`nf generate` with a model that answers in capitals: what goes where, what counts as failed, what stops it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_double import EchoModel

import nf.llm
from nf.cli import main
from nf.cli.progress import Progress
from nf.inputs import request_seed
from nf.outputs import CompletionOutput, RequestMetrics, RequestOutput

Use = Callable[..., EchoModel]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Put an EchoModel in AsyncLLM's place; it notes what it was made with."""

    def install(**how: Any) -> EchoModel:
        model = EchoModel(**how)

        def make(name: str, **options: Any) -> EchoModel:
            model.made_with = (name, options)
            return model

        monkeypatch.setattr(nf.llm, "AsyncLLM", make)
        return model

    return install


def records(text: str) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda r: r["index"])


def prompts(folder: Path, *lines: str) -> str:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines))
    return str(path)


def test_one_prompt_is_text_on_stdout_and_a_summary_on_stderr(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    model = use()
    assert main(["generate", "-p", "hello"]) == 0
    out, err = capsys.readouterr()
    assert out == "HELLO\n"
    assert err.startswith("nf generate: 1 request in ")
    assert err.count("\n") == 1
    assert model.made_with == ("nf-tiny", {})
    assert model.closed


def test_quiet_echo_and_no_stream(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    for stream in ("--stream", "--no-stream"):
        use()
        assert main(["generate", "-p", "hello ", "--echo", "--quiet", stream]) == 0
        assert capsys.readouterr() == ("hello HELLO \n", "")


def test_several_prompts_come_in_their_order_under_titles(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    use()
    assert main(["generate", "-p", "a much longer prompt", "-p", "b\n c", "--n", "2"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert blocks == [
        "==> 1: a much longer prompt · 1 of 2 <==\nA MUCH LONGER PROMPT",
        "==> 1: a much longer prompt · 2 of 2 <==\nA MUCH LONGER PROMPT",
        "==> 2: b c · 1 of 2 <==\nB\n C",
        "==> 2: b c · 2 of 2 <==\nB\n C",
        "",
    ]


def test_parameters_come_from_the_line_then_the_flags_then_the_model(
    use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = use()
    path = prompts(tmp_path, "plain", '{"prompt": "own", "temperature": 0, "max_tokens": 9, "seed": 77}')
    flags = ["--max-tokens", "30", "--stop", "x", "--stop", "y", "--seed", "5", "--logit-bias", "3:-1.5,4:2"]
    assert main(["generate", "m", "--prompts-file", path, "--json", *flags, "--max-num-seqs", "8"]) == 0
    assert model.made_with == ("m", {"max_num_seqs": 8})
    plain, own = (params for _, params in model.seen)
    assert (plain.temperature, plain.top_p, plain.max_tokens) == (0.5, 0.9, 30)
    assert (plain.stop, plain.logit_bias) == (("x", "y"), {3: -1.5, 4: 2.0})
    assert (own.temperature, own.top_p, own.max_tokens) == (0, 0.9, 9)
    assert (plain.seed, own.seed) == (request_seed(5, 0), 77)
    assert [r["outputs"][0]["text"] for r in records(capsys.readouterr().out)] == ["PLAIN", "OWN"]


def test_without_flags_the_models_defaults_hold(use: Use) -> None:
    model = use()
    assert main(["generate", "-p", "x"]) == 0
    ((_, params),) = model.seen
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 256)
    assert params.seed == request_seed(0, 0)


def test_chat(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use()
    line = '{"messages": [{"role": "user", "content": "own"}]}'
    path = prompts(tmp_path, "hi", line, '{"prompt_token_ids": [1, 2]}')
    assert main(["generate", "--prompts-file", path, "--json", "--chat", "--system", "brief"]) == 0
    texts = [r["outputs"][0]["text"] for r in records(capsys.readouterr().out)]
    assert texts == ["SYSTEM:BRIEF|USER:HI", "USER:OWN", "{'prompt_token_ids': [1, 2]}"]


def test_what_cannot_be_run_harms_no_neighbour(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use()
    path = prompts(
        tmp_path, "good", "{bad", '{"prompt": "", "custom_id": "e"}', "nan", '{"prompt": "x", "n": 0}', "fine"
    )
    assert main(["generate", "--prompts-file", path, "--json"]) == 1
    out, err = capsys.readouterr()
    found = records(out)
    assert [r["index"] for r in found] == [0, 1, 2, 3, 4, 5]
    assert [bool(r["error"]) for r in found] == [False, True, True, True, True, False]
    assert found[2]["custom_id"] == "e"
    assert found[2]["error"] == "prompt: is empty"
    assert found[3]["error"] == "the logits held a NaN"
    assert found[4]["error"] == "n: must be between 1 and 128, not 0"
    assert "6 requests (4 failed)" in err
    assert main(["generate", "--prompts-file", path]) == 1
    out, err = capsys.readouterr()
    assert out == "==> 1: good <==\nGOOD\n\n==> 6: fine <==\nFINE\n\n"
    assert "prompts.txt line 2: line: is not valid JSON" in err


def test_a_failed_engine_ends_the_run_and_resuming_completes_it(
    use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results = prompts(tmp_path, *"abcdefgh"), tmp_path / "out.jsonl"
    command = ["generate", "--prompts-file", path, "--output", str(results), "--seed", "3"]
    broken = use(dies_at=3, max_num_seqs=1)
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", "nf generate: the engine failed: the device is gone")
    assert broken.closed
    kept = records(results.read_text())
    assert 0 < len(kept) < 8
    assert all(r["error"] is None for r in kept)
    model = use()
    assert main(command) == 0
    assert f"holds {len(kept)} results; going on" in capsys.readouterr().err
    assert [r["outputs"][0]["text"] for r in records(results.read_text())] == list("ABCDEFGH")
    assert sorted(prompt for prompt, _ in model.seen) == list("abcdefgh")[len(kept) :]
    assert [p.seed for _, p in model.seen] == [request_seed(3, i) for i in range(len(kept), 8)]
    again = use()
    assert main(command) == 0
    assert again.seen == []


def test_resuming_tries_errors_again(use: Use, tmp_path: Path) -> None:
    results = tmp_path / "out.jsonl"
    command = ["generate", "--prompts-file", prompts(tmp_path, "a", "{bad"), "--output", str(results)]
    use()
    assert main(command) == 1
    assert main(command) == 1, "the bad line is still bad"
    assert [r["index"] for r in records(results.read_text())] == [0, 1]
    prompts(tmp_path, "a", "repaired")
    assert main(command) == 0
    assert [r["outputs"][0]["text"] for r in records(results.read_text())] == ["A", "REPAIRED"]


def test_the_requests_in_flight_are_bounded_and_prompts_read_as_needed(use: Use, tmp_path: Path) -> None:
    model = use(max_num_seqs=3)
    path = prompts(tmp_path, *["some text"] * 50)
    assert main(["generate", "--prompts-file", path, "--json", "--quiet"]) == 0
    assert model.most_in_flight == 6
    assert len(model.seen) == 50


def send_when(signum: int, condition: Callable[[], bool]) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_keeps_what_is_finished(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = use(delay=0.01, max_num_seqs=2)
    results = tmp_path / "out.jsonl"
    path = prompts(tmp_path, "a", "b", "c" * 10_000, "d" * 10_000, "e" * 10_000, "f" * 10_000, "g")
    command = ["generate", "--prompts-file", path, "--output", str(results)]
    sender = send_when(signal.SIGINT, lambda: model.in_flight == 4 and len(model.seen) == 6)
    assert main(command) == 130
    sender.join()
    assert sorted(model.aborted) == ["2", "3", "4", "5"]
    assert model.closed
    assert [r["index"] for r in records(results.read_text())] == [0, 1]
    assert "stopped; 2 results kept in" in capsys.readouterr().err


def test_ctrl_c_ends_streamed_text_with_a_newline(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    model = use(delay=0.01)
    sender = send_when(signal.SIGINT, lambda: model.steps > 3)
    assert main(["generate", "-p", "endless" * 10_000]) == 130
    sender.join()
    assert capsys.readouterr().out.endswith("\n")


def test_sigterm_lets_requests_in_flight_end(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = use(delay=0.02, max_num_seqs=1)
    path = prompts(tmp_path, *["0123456789"] * 100)
    sender = send_when(signal.SIGTERM, lambda: model.in_flight == 2)
    assert main(["generate", "--prompts-file", path, "--json"]) == 143
    sender.join()
    out, err = capsys.readouterr()
    assert len(records(out)) == len(model.seen) < 100
    assert model.aborted == []
    assert "requests in flight get 10 s" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give a prompt, e.g. nf generate -p"),
        (["-p", "x", "--prompts-file", "y"], "--prompts-file: cannot be used with -p"),
        (["-p", "x", "--system", "s"], "--system: needs --chat"),
        (["-p", "x", "--overwrite"], "--overwrite: needs --output FILE"),
        (["-p", "x", "--logprobs", "3"], "--logprobs: shows in JSON only"),
        (["-p", "x", "--token-ids"], "--token-ids: shows in JSON only"),
        (["-p", "x", "--json", "--echo"], "--echo: is for text"),
        (["-p", "x", "--json", "--stream"], "--stream: shows the text of one -p"),
        (["-p", "x", "-p", "y", "--stream"], "--stream: shows the text of one -p"),
        (["-p", "x", "--top-p", "0"], "--top-p: must be in (0, 1], not 0.0"),
        (["-p", "x", "--temperature", "nan"], "--temperature: must be in [0, 2], not nan"),
        (["-p", "x", "--top-k", "-5"], "--top-k: must be between -1 and 2147483647, not -5"),
        (["-p", "x", "--n", "2", "--temperature", "0"], "--n: 2 greedy continuations would be equal"),
        (["-p", "x", "--stop", ""], "--stop: must hold non-empty strings"),
        (["-p", "x", "--max-model-len", "0"], "--max-model-len: must be at least 1, not 0"),
        (["-p", "x", "--chat", "--chat-template", "/missing"], "--chat-template: cannot read /missing"),
        (["--prompts-file", "/missing"], "--prompts-file: cannot read /missing"),
        (["-p", "x", "--output", "/missing/x"], "--output: cannot write /missing/x"),
        (["-p", "x", "--output", "-"], "--output: takes a file; --json prints the same lines to stdout"),
        (["-p", "\udcff"], "-p: prompt 1 is not valid UTF-8"),
    ],
)
def test_wrong_usage_is_one_sentence_before_the_model_is_loaded(
    use: Use, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    model = use()
    assert main(["generate", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not hasattr(model, "made_with")


@pytest.mark.parametrize("flag", ["--prompts-file", "--chat-template"])
def test_results_never_overwrite_what_is_read(
    use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    use()
    path, link = prompts(tmp_path, "a"), tmp_path / "link"
    link.symlink_to(path)
    source = [flag, path] if flag == "--prompts-file" else ["-p", "x", flag, path]
    for output in (path, str(link)):
        assert main(["generate", *source, "--output", output, "--overwrite"]) == 2
        assert (
            capsys.readouterr().err == f"nf generate: --output: is the file of {flag}; results need one of their own\n"
        )
        assert Path(path).read_text() == "a"


def test_a_full_disk_is_named(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use()
    assert main(["generate", "--prompts-file", prompts(tmp_path, "a"), "--output", "/dev/full", "-q"]) == 1
    assert capsys.readouterr().err == "nf generate: /dev/full: No space left on device\n"


def finished(num_tokens: int, ttft: float, tpot: float) -> RequestOutput:
    metrics = RequestMetrics(10.0, 10.0, 10.0 + ttft, 10.0 + ttft + tpot * (num_tokens - 1))
    return RequestOutput("0", None, [1] * 7, [CompletionOutput(0, token_ids=[1] * num_tokens)], True, metrics)


def test_the_summary_counts_tokens_and_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(total=3, bar=False)
    assert not progress.worked
    for num_tokens, ttft, tpot in ((1000, 0.010, 0.002), (500, 0.030, 0.004), (1, 0.020, 0.0)):
        now[0] += 1.0
        progress.tokens(num_tokens)
        progress.done(finished(num_tokens, ttft, tpot))
    now[0] += 50.0
    progress.fail()
    assert progress.summary() == (
        "4 requests (1 failed) in 3.00 s · 21 tokens in, 1,501 out · 507.3 tokens/s (500.3 out) · "
        "TTFT 20.0 ms, TPOT 3.0 ms (median)"
    )


def test_the_bar_shows_requests_and_tokens_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=2, bar=True)
    progress.tokens(40)
    progress.done(finished(40, 0.1, 0.1))
    progress.skip()
    progress.close()
    assert "2/2" in capsys.readouterr().err
