"""The results file: appended to, resumed, repaired, never mistaken for something else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nf.cli.prompts import Job
from nf.cli.records import ResultsFile, dump, error_record, result_record
from nf.errors import InputError
from nf.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def job(index: int, custom_id: str | None = None, prompt: str | None = None) -> Job:
    return Job(index, f"line {index + 1}", {"prompt": prompt or f"prompt {index} \u2028 ü"}, custom_id=custom_id)


def output(text: str = "text", **changes: object) -> RequestOutput:
    completion = CompletionOutput(0, text, [5, 6], finish_reason="stop", stop_reason="\n")
    fields = {"prompt": "p", "prompt_token_ids": [1, 2, 3], "outputs": [completion], "finished": True} | changes
    return RequestOutput(request_id="0", metrics=RequestMetrics(0.0), **fields)  # type: ignore[arg-type]


def result(of: Job) -> dict[str, object]:
    return result_record(of, output(), token_ids=False)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def resume(path: Path, jobs: list[Job]) -> list[dict[str, object]]:
    """What the file holds once every job that has no result yet has got one."""
    file = ResultsFile(str(path))
    for one in jobs:
        if not file.holds(one):
            file.write(result(one))
    file.close()
    return lines(path)


def test_a_record_holds_what_was_asked_and_what_came() -> None:
    plain = result_record(job(3, "x"), output(), token_ids=False)
    assert plain == {
        "index": 3,
        "custom_id": "x",
        "prompt": "prompt 3 \u2028 ü",
        "outputs": [{"index": 0, "text": "text", "finish_reason": "stop", "stop_reason": "\n"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "error": None,
    }
    assert result_record(job(3), output(), token_ids=True)["outputs"][0]["token_ids"] == [5, 6]


def test_logprobs_are_valid_json_likeliest_first() -> None:
    position = {5: Logprob(float("-inf"), 9, "a"), 8: Logprob(-0.1, 1, "b"), 7: Logprob(-2.0, 2, "c")}
    completion = CompletionOutput(0, "text", [5, 8], logprobs=[position, {8: Logprob(-0.1, 1, "b")}])
    made = output(outputs=[completion], prompt_logprobs=[None, {2: Logprob(-1.0, 1)}, {3: Logprob(-1.0, 1)}])
    record = json.loads(dump(result_record(job(0), made, token_ids=False)))
    first = record["outputs"][0]["logprobs"][0]
    assert (first["token_id"], first["token"], first["logprob"], first["rank"]) == (5, "a", -9999.0, 9)
    assert [top["token_id"] for top in first["top_logprobs"]] == [8, 7, 5]
    assert [entry and entry["token_id"] for entry in record["prompt_logprobs"]] == [None, 2, 3]


def test_resuming_after_a_kill_gives_each_job_exactly_once(tmp_path: Path) -> None:
    jobs = [job(0), job(1, "eins"), job(2, "zwei")]
    path = tmp_path / "out.jsonl"
    resume(path, jobs)
    whole = path.read_bytes()
    assert len(lines(path)) == 3
    ends = [i + d for i, byte in enumerate(whole) if byte == ord("\n") for d in (-1, 0, 1)]
    for end in sorted({*range(0, len(whole), 23), *range(12), *ends}):
        path.write_bytes(whole[:end])
        records = resume(path, jobs)
        assert [(r["index"], r["custom_id"]) for r in records] == [(0, None), (1, "eins"), (2, "zwei")], end


def test_errors_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    file = ResultsFile(str(path))
    file.write(error_record(job(0), "too long"))
    file.write(result(job(1)))
    file.write(error_record(job(2), "too long"))
    file.close()
    assert [r["index"] for r in resume(path, [job(0), job(1), job(2)])] == [1, 0, 2]
    assert all(r["error"] is None for r in lines(path))
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_bad_line_is_never_taken_for_finished(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    resume(path, [job(0)])
    file = ResultsFile(str(path))
    assert not file.holds(Job(0, "line 1", error="is not valid JSON"))
    file.close()


def test_a_result_of_another_prompt_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    resume(path, [job(0)])
    file = ResultsFile(str(path))
    with pytest.raises(InputError, match=r"another prompt than line 1; name another file, or --overwrite"):
        file.holds(job(0, prompt="changed"))
    file.close()


@pytest.mark.parametrize(
    "content",
    ["notes\n", "notes", '{"index": 1}\n', '{"index": "a", "outputs": [], "error": null}\n', "[1]\n", "\0\0", "\n"],
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=r"line 1 is not a result of nf generate; name another file"):
        ResultsFile(str(path))
    assert path.read_text() == content


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("notes\n")
    file = ResultsFile(str(path), overwrite=True)
    assert not file.holds(job(0))
    file.write(result(job(0)))
    file.close()
    assert len(lines(path)) == 1


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = ResultsFile(str(path))
    first.write(result(job(0)))
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is being written by another nf generate"):
            ResultsFile(str(path), overwrite=overwrite)
    assert len(lines(path)) == 1
    first.close()
    ResultsFile(str(path)).close()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(real)
    file = ResultsFile(str(link))
    file.write(error_record(job(0), "too long"))
    file.close()
    resume(link, [job(0)])
    assert link.is_symlink()
    assert [r["error"] for r in lines(real)] == [None]


def test_a_pipe_is_only_written_to() -> None:
    reading, writing = os.pipe()
    file = ResultsFile(f"/proc/self/fd/{writing}")
    file.write(result(job(0)))
    file.close()
    os.close(writing)
    with open(reading) as pipe:
        assert json.loads(pipe.read())["index"] == 0


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "out.jsonl"):
        with pytest.raises(InputError, match=f"--output: cannot write {path}"):
            ResultsFile(str(path))
    full = ResultsFile("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        full.write(result(job(0)))
    assert caught.value.filename == "/dev/full"
    full.close()
