"""Prompts files: what a line may be, and what is said of a line that is none of it."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from nf.cli.prompts import Job, PromptsFile, TextPrompts, fingerprint
from nf.errors import InputError


def read(path: Path | str) -> list[Job]:
    async def collect() -> list[Job]:
        return [job async for job in source.read()]

    source = PromptsFile(str(path))
    try:
        return asyncio.run(collect())
    finally:
        source.close()


def write(folder: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def error_of(folder: Path, line: str | bytes) -> str:
    """What is said of one line of a .jsonl file that stands between two good ones."""
    line = line.encode() if isinstance(line, str) else line
    before, bad, after = read(write(folder, b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n', "p.jsonl"))
    assert (before.source, before.error) == ({"prompt": "a"}, None)
    assert (after.source, after.error) == ({"prompt": "b"}, None)
    assert (before.index, bad.index, after.index) == (0, 1, 2)
    assert bad.error is not None
    assert bad.source == {}
    return bad.error


def test_plain_lines_are_prompts_as_they_stand(tmp_path: Path) -> None:
    jobs = read(write(tmp_path, "\ufeff one \r\n\n  \nthrée\nlast"))
    assert [job.source["prompt"] for job in jobs] == [" one ", "thrée", "last"]
    assert [job.index for job in jobs] == [0, 1, 2]
    assert jobs[1].where.endswith("prompts.txt line 4")


def test_objects_carry_ids_and_parameters(tmp_path: Path) -> None:
    lines = (
        '{"prompt": "a", "custom_id": "x", "max_tokens": 3, "sampling_params": {"temperature": 0}}\n'
        "plain\n"
        ' {"prompt_token_ids": [1, 2]}\n'
        '{"messages": [{"role": "user", "content": "hi"}]}\n'
    )
    first, plain, ids, chat = read(write(tmp_path, lines))
    assert first == Job(0, first.where, {"prompt": "a"}, {"max_tokens": 3, "temperature": 0}, "x")
    assert first.key == "x"
    assert plain.key == 1
    assert ids.source == {"prompt_token_ids": [1, 2]}
    assert chat.source == {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{bad", "is not valid JSON"),
        ("plain", "is not valid JSON"),
        ('"text"', "must be a JSON object"),
        ("{}", "must hold one of prompt, prompt_token_ids or messages, not none"),
        ('{"prompt": "a", "messages": []}', "not prompt and messages"),
        ('{"prompt": 3}', "prompt: must be a string, not 3"),
        ('{"prompt": [1, 2]}', "token ids go into prompt_token_ids"),
        ('{"prompt_token_ids": "abc"}', "must be a list of token ids"),
        ('{"prompt_token_ids": [true]}', "must be a list of token ids"),
        ('{"messages": "hi"}', "must be a list of objects with role and content"),
        ('{"prompt": "a", "tempurature": 1}', "did you mean temperature?"),
        ('{"prompt": "a", "zzz": 1}', "it takes prompt, prompt_token_ids"),
        ('{"prompt": "a", "custom_id": 5}', "custom_id: must be a non-empty string, not 5"),
        ('{"prompt": "a", "sampling_params": 5}', "sampling_params: must be an object, not 5"),
        ('{"prompt": "a", "n": 1, "sampling_params": {"n": 2}}', "n: is given twice"),
        (r'{"prompt": "\ud800"}', "surrogate"),
        (b"\xff\xfe", "is not valid UTF-8 at byte 1"),
        ("[" * 100_000, "is no JSON that can be read"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "is no JSON that can be read"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(tmp_path: Path, line: str | bytes, said: str) -> None:
    assert said in error_of(tmp_path, line)


def test_a_custom_id_names_one_line_only(tmp_path: Path) -> None:
    line = '{"prompt": "a", "custom_id": "x"}\n'
    first, second, third = read(write(tmp_path, line + line + '{"prompt": 1, "custom_id": "y"}\n'))
    assert first.error is None
    assert second.error == "custom_id: 'x' was already used in line 1"
    assert second.custom_id is None, "the id belongs to the first line's result"
    assert third.error is not None
    assert third.custom_id == "y"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="holds no prompt"):
        PromptsFile(str(write(tmp_path, content)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*missing"):
        PromptsFile(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="directory"):
        PromptsFile(str(tmp_path))


def test_total_counts_prompts_without_using_them_up(tmp_path: Path) -> None:
    path = write(tmp_path, "a\n\nb\nc")
    source = PromptsFile(str(path))
    assert source.total == 3
    source.close()
    assert len(read(path)) == 3


def test_a_slow_pipe_gives_each_line_as_it_comes_and_blocks_nobody(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    asked = threading.Event()

    def talk() -> None:
        with open(fifo, "wb", buffering=0) as file:
            file.write(b"first\nsec")
            assert asked.wait(10)
            file.write(b"ond\n")

    async def listen() -> list[str]:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        jobs = source.read()
        found = [(await anext(jobs)).source["prompt"]]
        waiting = asyncio.ensure_future(anext(jobs))
        before = turns
        while turns < before + 100:  # other tasks go on while the pipe has nothing
            await asyncio.sleep(0)
        asked.set()
        found.append((await waiting).source["prompt"])
        counting.cancel()
        return found

    talker = threading.Thread(target=talk)
    talker.start()
    source = PromptsFile(str(fifo))
    assert source.total is None
    assert asyncio.run(listen()) == ["first", "second"]
    talker.join()
    source.close()


def test_an_empty_pipe_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    talker = threading.Thread(target=lambda: open(fifo, "wb").close())
    talker.start()
    with pytest.raises(InputError, match="holds no prompt"):
        read(fifo)
    talker.join()


def test_prompts_of_the_command_line_must_be_text() -> None:
    assert [job.where for job in TextPrompts(["a", "b"]).jobs] == ["-p prompt 1", "-p prompt 2"]
    assert TextPrompts(["a"]).jobs[0].where == "-p"
    with pytest.raises(InputError, match="not valid UTF-8"):
        TextPrompts(["a", "b\udcff"])


def test_fingerprints_tell_sources_apart() -> None:
    sources = [{"prompt": "a"}, {"prompt": "b"}, {"prompt_token_ids": [1]}, {"prompt": "[1]"}]
    assert len({fingerprint(source) for source in sources}) == len(sources)
    assert fingerprint({"prompt": "ü"}) == fingerprint({"prompt": "ü"})
