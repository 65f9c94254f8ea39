"""Compilers in processes of their own.

The DSL's compiler keeps state and is not thread-safe, and a compiler that fails may end its process. These are plain
processes: those of multiprocessing run the user's script again, and go on when their parent is killed. One is asked for
kernels on its standard input, whose end is its own, in lines of JSON, and answers with one that the binary follows.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Any

from nf.kernels.source import KernelSource

_SERVE = "import sys; sys.path[:] = {path!r}; from nf.kernels.compiler_processes import serve; serve()"

ENDING_SECONDS = 1.0  # from the end of what a process says to its own


class CompilerProcessError(RuntimeError):
    """The compiler refused the source, or ended."""


class CompilerProcesses:
    """``count`` processes, which as many threads can use at a time; as a context, at whose end they end."""

    def __init__(self, count: int) -> None:
        self.stopped = threading.Event()
        self._all = [_Process() for _ in range(count)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._all:
            self._idle.put(process)

    def compile(self, source: KernelSource, arch: str) -> bytes:
        """A compiled kernel; see ``toolchain.compile_source``.

        Raises:
            CompilerProcessError: says why there is none.
        """
        process = self._idle.get()
        try:
            return process.compile(source, arch)
        finally:
            self._idle.put(process)

    def stop(self) -> None:
        """End all of them at once: what they are compiling fails, and what they are asked for from now on."""
        self.stopped.set()
        for process in self._all:
            process.kill()

    def __enter__(self) -> CompilerProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        for process in self._all:
            process.close()


class _Process:
    """Begun when it is first asked, and anew when it is asked after it ended."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 — by compilers; as long as this
        self._lock = threading.Lock()  # between beginning and killing
        self._killed = False

    def compile(self, source: KernelSource, arch: str) -> bytes:
        try:
            running = self._begun()
        except OSError as error:
            raise CompilerProcessError(f"its compiler cannot be begun: {error}") from None
        self._said.seek(0)
        self._said.truncate()  # what is said from here on is about this kernel
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            running.stdin.write(json.dumps([asdict(source), arch]).encode() + b"\n")
            running.stdin.flush()
            answer = json.loads(running.stdout.readline())
            binary = running.stdout.read(answer["bytes"])
            whole = len(binary) == answer["bytes"]
        except (OSError, ValueError, TypeError, KeyError):  # its end, or what is no answer
            whole = False
        if not whole:
            reason = self._how_it_ended(running)
            self._forget(running)
            raise CompilerProcessError(reason)
        if answer["error"]:
            raise CompilerProcessError(answer["error"])
        return binary

    def kill(self) -> None:
        with self._lock:
            self._killed = True
            if self._running is not None:
                self._running.kill()

    def close(self) -> None:
        if self._running is not None:
            self._forget(self._running)
        self._said.close()

    def _begun(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._killed:
                raise CompilerProcessError("stopped")
            if self._running is None:
                self._running = subprocess.Popen(
                    [sys.executable, "-c", _SERVE.format(path=sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._said,
                    start_new_session=True,  # an interrupt at the terminal is for the parent alone
                )
            return self._running

    def _how_it_ended(self, running: subprocess.Popen[bytes]) -> str:
        try:
            status = running.wait(timeout=ENDING_SECONDS)
        except subprocess.TimeoutExpired:  # it only said what it should not
            running.kill()
            status = running.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        hint = ["for want of memory? Fewer processes need less"] if status == -signal.SIGKILL else []
        return ": ".join([f"its compiler ended with {how}", *(lines[-1:] or hint)])

    def _forget(self, running: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running = None
        with contextlib.suppress(OSError), running:  # closes its pipes and waits
            running.kill()


def serve() -> None:
    """What such a process does: compile what is asked for, and answer with the binary or with what was wrong."""
    from nf.kernels.toolchain import compile_source

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # compilers print
    for name in [name for name in os.environ if name.startswith("CUTE_DSL_")]:
        del os.environ[name]  # they change what is made, and are not part of a kernel's fingerprint
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            fields, arch = json.loads(line)
            binary, error = b"", ""
            try:
                binary = compile_source(_source(fields), arch)
            except Exception as refusal:
                error = str(refusal).rstrip("\0\n ") or type(refusal).__name__
            answers.write(json.dumps({"bytes": len(binary), "error": error}).encode() + b"\n" + binary)
            answers.flush()


def _source(fields: dict[str, Any]) -> KernelSource:
    """Of the source's fields, in which JSON has lists for tuples."""
    config = tuple((name, value) for name, value in fields["config"])
    return KernelSource(
        **fields | {"files": tuple(fields["files"]), "parameters": tuple(fields["parameters"]), "config": config}
    )
