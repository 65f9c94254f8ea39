"""One JSON object per finished request, and the file of them that survives kill -9."""

from __future__ import annotations

import fcntl
import json
import os
from typing import Any

from nf.cli.prompts import Job, fingerprint
from nf.errors import InputError
from nf.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs

_HEAD = b'{"index": '  # how every record starts: tells a torn record from a file that is not ours
_LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON has not


def result_record(job: Job, output: RequestOutput, *, token_ids: bool) -> dict[str, Any]:
    """What is kept of a finished request; ``usage`` counts as OpenAI's API does."""
    completion_tokens = sum(len(o.token_ids) for o in output.outputs)
    prompt_tokens = len(output.prompt_token_ids)
    record: dict[str, Any] = {"index": job.index, "custom_id": job.custom_id, **job.source}
    if output.prompt_logprobs is not None:
        ids = output.prompt_token_ids
        record["prompt_logprobs"] = [_logprobs(i, p) for i, p in zip(ids, output.prompt_logprobs, strict=True)]
    return record | {
        "outputs": [_completion(o, token_ids=token_ids) for o in output.outputs],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
        "error": None,
    }


def error_record(job: Job, sentence: str) -> dict[str, Any]:
    """What is kept of a prompt that could not be run."""
    return {"index": job.index, "custom_id": job.custom_id, **job.source, "outputs": [], "error": sentence}


def dump(record: dict[str, Any]) -> bytes:
    """The record as one line of UTF-8."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    assert line.startswith(_HEAD)
    return line


def _completion(output: CompletionOutput, *, token_ids: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"index": output.index, "text": output.text}
    if token_ids:
        record["token_ids"] = list(output.token_ids)
    record |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
    if output.logprobs is not None:
        pairs = zip(output.token_ids, output.logprobs, strict=True)
        record["logprobs"] = [_logprobs(token_id, logprobs) for token_id, logprobs in pairs]
    return record


def _logprobs(token_id: int, logprobs: TokenLogprobs | None) -> dict[str, Any] | None:
    """One position: the token that stands there and the likeliest ones, likeliest first."""
    if logprobs is None:
        return None
    likeliest = sorted(logprobs.items(), key=lambda item: item[1].rank)
    return _logprob(token_id, logprobs[token_id]) | {"top_logprobs": [_logprob(i, p) for i, p in likeliest]}


def _logprob(token_id: int, value: Logprob) -> dict[str, Any]:
    logprob = max(float(value.logprob), _LEAST_LOGPROB)
    return {"token_id": int(token_id), "token": value.decoded_token, "logprob": logprob, "rank": int(value.rank)}


class ResultsFile:
    """The --output file: appended to, one write per record, so that a killed run loses only what was in flight.

    Opening an existing file takes up where it ended: a torn last line is cut off, and records with an error are
    dropped so that their prompts are tried again. ``finished`` is the number of results that stay. The file is
    locked while it is open. A pipe or a device is only written to.

    Raises:
        InputError: the file cannot be written, is in use, or holds something else.
    """

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        self._regular = os.path.isfile(path) or not os.path.exists(path)
        self.path = os.path.realpath(path) if self._regular else path
        self._prompts: dict[str | int, bytes] = {}  # key of a finished job → fingerprint of its prompt
        self._fd = self._open()
        if self._regular:
            try:
                self._lock(self._fd)
                if overwrite:
                    os.ftruncate(self._fd, 0)
                self._take_up()
            except BaseException:
                os.close(self._fd)
                raise

    @property
    def finished(self) -> int:
        return len(self._prompts)

    def holds(self, job: Job) -> bool:
        """Whether the result of this job is already there.

        Raises:
            InputError: there is one, but for another prompt.
        """
        known = self._prompts.get(job.key)
        if known is None or job.error is not None:
            return False
        if known != fingerprint(job.source):
            raise InputError(
                "--output",
                f"{self.path} holds a result for another prompt than {job.where}; "
                "name another file, or --overwrite to start anew",
            )
        return True

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; when this returns, no end of this process can lose it."""
        line = memoryview(dump(record))
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            raise type(error)(error.errno, error.strerror, self.path) from None

    def sync(self) -> None:
        """Wait until what was written would survive a power failure too."""
        if self._regular:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        mode = os.O_RDWR | os.O_CREAT | os.O_APPEND if self._regular else os.O_WRONLY
        try:
            return os.open(self.path, mode | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError("--output", f"cannot write {self.path} ({error.strerror})") from None

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("--output", f"{self.path} is being written by another nf generate") from None

    def _take_up(self) -> None:
        """Read what an earlier run left, and repair it."""
        end = 0  # where the last whole record ends
        failed = False
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and (line.startswith(_HEAD) or _HEAD.startswith(line)):
                    break
                record = self._parse(line, number)
                end += len(line)
                if record["error"] is None:
                    self._remember(record)
                failed |= record["error"] is not None
        os.ftruncate(self._fd, end)
        if failed:
            self._drop_errors()

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record["index"], int) and isinstance(record["outputs"], list) and "error" in record:
                return dict(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise InputError(
            "--output",
            f"{self.path} line {number} is not a result of nf generate; name another file, or --overwrite it",
        )

    def _remember(self, record: dict[str, Any]) -> None:
        source: dict[str, Any] = {
            name: record[name] for name in ("prompt", "prompt_token_ids", "messages") if name in record
        }
        custom_id = record.get("custom_id")
        self._prompts[record["index"] if custom_id is None else custom_id] = fingerprint(source)

    def _drop_errors(self) -> None:
        """Replace the file, in one step, by a copy without its error records."""
        copy = f"{self.path}.tmp"
        with open(os.dup(self._fd), "rb") as old, open(copy, "wb") as new:
            old.seek(0)
            new.writelines(line for line in old if json.loads(line)["error"] is None)
            new.flush()
            os.fsync(new.fileno())
        os.replace(copy, self.path)
        fd = self._open()
        self._lock(fd)
        os.close(self._fd)
        self._fd = fd
