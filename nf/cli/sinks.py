"""Where the results of `nf generate` go: text or JSON lines on stdout, or a file."""

from __future__ import annotations

import sys
from typing import Protocol

from nf.cli.prompts import Job
from nf.cli.records import ResultsFile, dump, error_record, result_record
from nf.outputs import RequestOutput

_TITLE_CHARS = 60


class Sink(Protocol):
    """Takes the outputs of jobs, in whatever order they come.

    ``prints`` if that can show on a terminal, ``streams`` if it shows outputs that are not finished.
    """

    prints: bool
    streams: bool

    def holds(self, job: Job) -> bool:
        """Whether an earlier run has finished this job."""
        ...

    def update(self, job: Job, output: RequestOutput) -> None:
        """The job has come further; texts are cumulative."""
        ...

    def finish(self, job: Job, output: RequestOutput) -> None: ...

    def fail(self, job: Job, sentence: str) -> None: ...

    def close(self) -> None:
        """Write what is still held back."""
        ...


class _StdoutSink:
    prints = True
    streams = False

    def holds(self, _job: Job) -> bool:
        return False

    def update(self, _job: Job, output: RequestOutput) -> None:
        pass

    def close(self) -> None:
        pass


class StreamSink(_StdoutSink):
    """The text of one job, as it arrives."""

    streams = True

    def __init__(self, *, echo: bool) -> None:
        self._echo = echo
        self._text = ""

    def update(self, _job: Job, output: RequestOutput) -> None:
        if self._echo:
            _print(output.prompt or "")
            self._echo = False
        new = output.outputs[0].text[len(self._text) :]
        self._text += new
        _print(new)

    def finish(self, job: Job, output: RequestOutput) -> None:
        self.update(job, output)

    def fail(self, job: Job, sentence: str) -> None:
        self.close()
        _complain(job, sentence)

    def close(self) -> None:
        if self._text and not self._text.endswith("\n"):
            _print("\n")
        self._text = ""


class TextSink(_StdoutSink):
    """Text in the order of the prompts, each under a title unless it is the only one."""

    def __init__(self, *, titles: bool, echo: bool) -> None:
        self._titles = titles
        self._echo = echo
        self._held: dict[int, tuple[Job, RequestOutput | str]] = {}
        self._next = 0

    def finish(self, job: Job, output: RequestOutput) -> None:
        self._hold(job, output)

    def fail(self, job: Job, sentence: str) -> None:
        self._hold(job, sentence)

    def _hold(self, job: Job, result: RequestOutput | str) -> None:
        self._held[job.index] = (job, result)
        while self._next in self._held:
            self._show(*self._held.pop(self._next))
            self._next += 1

    def close(self) -> None:
        for index in sorted(self._held):
            self._show(*self._held.pop(index))

    def _show(self, job: Job, result: RequestOutput | str) -> None:
        if isinstance(result, str):
            _complain(job, result)
            return
        for completion in result.outputs:
            text = (result.prompt or "") + completion.text if self._echo else completion.text
            if self._titles:
                of = f" · {completion.index + 1} of {len(result.outputs)}" if len(result.outputs) > 1 else ""
                text = f"==> {_title(job, result)}{of} <==\n{text}"
            _print(text + ("" if text.endswith("\n") else "\n") + ("\n" if self._titles else ""))


class JsonSink(_StdoutSink):
    """One JSON object per job, as it finishes; on stdout, or in a file."""

    def __init__(self, file: ResultsFile | None = None, *, token_ids: bool) -> None:
        self.prints = file is None and sys.stdout.isatty()
        self._file = file
        self._token_ids = token_ids

    def holds(self, job: Job) -> bool:
        return self._file is not None and self._file.holds(job)

    def finish(self, job: Job, output: RequestOutput) -> None:
        self._write(result_record(job, output, token_ids=self._token_ids or job.params.get("detokenize") is False))

    def fail(self, job: Job, sentence: str) -> None:
        self._write(error_record(job, sentence))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, record: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(record)
        else:
            sys.stdout.buffer.write(dump(record))
            sys.stdout.buffer.flush()


def _title(job: Job, output: RequestOutput) -> str:
    """`3: the prompt's first words …`, or the custom_id."""
    text = " ".join((output.prompt or "").split())
    if len(text) > _TITLE_CHARS:
        text = text[: _TITLE_CHARS - 1] + "…"
    name = str(job.index + 1) if job.custom_id is None else job.custom_id
    return f"{name}: {text}" if text else name


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _complain(job: Job, sentence: str) -> None:
    print(f"nf generate: {job.where}: {sentence}", file=sys.stderr)
