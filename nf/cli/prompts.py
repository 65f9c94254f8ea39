"""Prompts of `nf generate`: from -p, or from a file of lines that is read as it is needed."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import IO, Any

from nf.errors import InputError
from nf.sampling_params import SamplingParams

_READ_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20

_SOURCES = ("prompt", "prompt_token_ids", "messages")
_FIELDS = (*_SOURCES, "custom_id", "sampling_params", *SamplingParams.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and what is particular to it.

    Args:
        index: place among the prompts, from 0.
        where: how to speak of it to the user: "prompts.jsonl line 3".
        source: one of {"prompt": str}, {"prompt_token_ids": [int]}, {"messages": [dict]}.
        params: sampling parameters of this prompt alone.
        custom_id: the user's name for it, unique in the file.
        error: why this line cannot be run; ``source`` is then empty.
    """

    index: int
    where: str
    source: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    custom_id: str | None = None
    error: str | None = None

    @property
    def key(self) -> str | int:
        """What tells its result from others': the custom_id where there is one, or the index."""
        return self.index if self.custom_id is None else self.custom_id


def fingerprint(source: dict[str, Any]) -> bytes:
    """8 bytes that tell two prompts apart, so that a result is never taken for another prompt's."""
    text = json.dumps(source, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class TextPrompts:
    """The prompts given with -p."""

    def __init__(self, texts: list[str]) -> None:
        for number, text in enumerate(texts, 1):
            if not _encodable(text):
                raise InputError("-p", f"prompt {number} is not valid UTF-8")
        names = ["-p"] if len(texts) == 1 else [f"-p prompt {number}" for number in range(1, len(texts) + 1)]
        self.jobs = [Job(i, names[i], {"prompt": text}) for i, text in enumerate(texts)]
        self.total: int | None = len(texts)

    async def read(self) -> AsyncIterator[Job]:
        for job in self.jobs:
            yield job

    def close(self) -> None:
        pass


class PromptsFile:
    """A file of prompts: a line is a prompt, or a JSON object when it starts with ``{`` or the file ends in .jsonl.

    ``total`` is the number of prompts, None where the file is a pipe and cannot be counted.
    """

    def __init__(self, path: str) -> None:
        self.name = "stdin" if path == "-" else path
        self.jsonl = path.endswith((".jsonl", ".ndjson"))
        try:
            self._file: IO[bytes] = open(0 if path == "-" else path, "rb", 0, closefd=path != "-")  # noqa: SIM115
        except OSError as error:
            raise InputError("--prompts-file", f"cannot read {self.name} ({error.strerror})") from None
        self._fd = self._file.fileno()
        self.total = _count_lines(self._fd)
        if self.total == 0:
            self.close()
            raise self._empty()

    async def read(self) -> AsyncIterator[Job]:
        """Jobs in the file's order; a line that cannot be run becomes a job with an error."""
        index = 0
        first_use: dict[str, int] = {}  # custom_id → line number
        number = 0
        async for line in _lines(self._fd, self.name):
            number += 1
            if not line.strip():
                continue
            job = _parse_line(line, index, f"{self.name} line {number}", jsonl=self.jsonl)
            if job.custom_id is not None:
                first = first_use.setdefault(job.custom_id, number)
                if first != number:
                    job = Job(index, job.where, error=f"custom_id: {job.custom_id!r} was already used in line {first}")
            index += 1
            yield job
        if index == 0:
            raise self._empty()

    def _empty(self) -> InputError:
        return InputError("--prompts-file", f"{self.name} holds no prompt; it takes one per line")

    def close(self) -> None:
        self._file.close()


def _parse_line(line: bytes, index: int, where: str, *, jsonl: bool) -> Job:
    try:
        text = line.decode("utf-8-sig" if index == 0 else "utf-8").removesuffix("\r")
        if not jsonl and not text.lstrip().startswith("{"):
            return Job(index, where, {"prompt": text})
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return Job(index, where, error=f"line: is not valid UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return Job(index, where, error=f"line: is not valid JSON ({error.msg} at character {error.pos + 1})")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        return Job(index, where, error=f"line: is no JSON that can be read ({error})")
    try:
        return _parse_object(value, index, where)
    except InputError as error:
        custom_id = value.get("custom_id") if isinstance(value, dict) else None
        usable = isinstance(custom_id, str) and custom_id and _encodable(custom_id)
        return Job(index, where, custom_id=custom_id if usable else None, error=str(error))


def _parse_object(value: Any, index: int, where: str) -> Job:
    if not isinstance(value, dict):
        raise InputError("line", "must be a JSON object with prompt, prompt_token_ids or messages")
    if not _encodable(json.dumps(value, ensure_ascii=False)):
        raise InputError("line", "holds half of a surrogate pair, which is not text")
    for name in value:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(_FIELDS)}"
            raise InputError(name, f"is not a field of a prompt; {hint}")
    given = [name for name in _SOURCES if value.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InputError("line", f"must hold one of prompt, prompt_token_ids or messages, not {found}")
    return Job(
        index,
        where,
        source={given[0]: _check_source(given[0], value[given[0]])},
        params=_params(value),
        custom_id=_custom_id(value.get("custom_id")),
    )


def _check_source(name: str, value: Any) -> Any:
    if name == "prompt" and not isinstance(value, str):
        raise InputError("prompt", f"must be a string, not {_brief(value)}; token ids go into prompt_token_ids")
    if name == "prompt_token_ids" and not _is_list_of(value, int):
        raise InputError("prompt_token_ids", f"must be a list of token ids, not {_brief(value)}")
    if name == "messages" and not _is_list_of(value, dict):
        raise InputError("messages", f"must be a list of objects with role and content, not {_brief(value)}")
    return value


def _params(value: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a line: inline ones, and those under sampling_params."""
    nested = value.get("sampling_params") or {}
    if not isinstance(nested, dict):
        raise InputError("sampling_params", f"must be an object, not {_brief(nested)}")
    inline = {name: value[name] for name in value if name in SamplingParams.__dataclass_fields__}
    for name in nested:
        if name in inline:
            raise InputError(name, "is given twice, in the line and in its sampling_params")
    return inline | nested


def _custom_id(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise InputError("custom_id", f"must be a non-empty string, not {_brief(value)}")


def _is_list_of(value: Any, type_: type) -> bool:
    return isinstance(value, list) and all(isinstance(x, type_) and not isinstance(x, bool) for x in value)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count_lines(fd: int) -> int | None:
    """Non-empty lines from here to the end; None if reading would use them up."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None
    start = os.lseek(fd, 0, os.SEEK_CUR)
    with open(os.dup(fd), "rb") as file:
        count = sum(1 for line in file if line.strip())
    os.lseek(fd, start, os.SEEK_SET)  # the copy shares its offset with fd
    return count


async def _lines(fd: int, name: str) -> AsyncIterator[bytes]:
    """Lines without their newline."""
    rest = b""
    while chunk := await _read(fd):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_LINE_BYTES:
            raise InputError("--prompts-file", f"{name} has a line of more than {MAX_LINE_BYTES >> 20} MiB")
    if rest:
        yield rest


async def _read(fd: int) -> bytes:
    """Up to 1 MiB; a pipe or terminal is waited for in the event loop, which a thread could not be stopped from."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    try:
        loop.add_reader(fd, wake)
    except PermissionError:  # a regular file is always ready, epoll refuses it
        return os.read(fd, _READ_BYTES)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
    return os.read(fd, _READ_BYTES)
