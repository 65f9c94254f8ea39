"""Runs a chat template in a process of its own, bounded in steps, time, memory and output."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from nf.errors import InputError

WORKER = Path(__file__).with_name("template_worker.py")
FUEL = 10_000_000  # the engine's instructions, and from its version 3 on text, per rendering: some 100,000 messages
MAX_BYTES = 1 << 30  # address space of the process
MAX_CHARS = 1 << 24  # of rendered text
MAX_SECONDS = 20.0


class TemplateProcess:
    """One template and the process that renders it, started at its first use and again after a failure.

    Safe to use from several threads; renderings take turns, each well under a millisecond.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[..., Any] | None = None
        self._owner = 0

    def render(self, context: Mapping[str, Any]) -> str:
        """The template's text for JSON values in ``context``.

        Raises:
            InputError: the template cannot be parsed, fails, refuses its input or exceeds a bound.
        """
        line = json.dumps(context).encode() + b"\n"
        with self._lock:
            try:
                reply = _exchange(self._running(), line)
            except TimeoutError:
                self._discard()
                raise InputError("chat_template", f"took more than {MAX_SECONDS:g} s to render") from None
            except (EOFError, BrokenPipeError):
                self._discard()
                limit = f"needs more than the {MAX_BYTES >> 20} MiB that it may take"
                raise InputError("chat_template", f"{limit}, or breaks the template engine") from None
            except BaseException:  # an interrupt: the reply to come would answer the next request
                self._discard()
                raise
        if reply.get("error") == "refused":
            raise InputError("messages", f"the chat template refuses them: {reply['message']}")
        if "error" in reply:
            raise InputError("chat_template", f"cannot be rendered: {reply['message']}")
        return reply["text"]

    def close(self) -> None:
        """End the process, and with it a rendering under way; the next rendering starts another."""
        process = self._process
        if process is not None and self._owner == os.getpid():
            process.kill()
        with self._lock:
            self._discard()

    def _discard(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        # A forked child must not talk through the pipes it shares with its parent.
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            self._discard()
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the engine
            )
            self._stop = weakref.finalize(self, _end, self._process, self._owner)
            limits = {"fuel": FUEL, "max_bytes": MAX_BYTES, "max_chars": MAX_CHARS}
            _pipe(self._process.stdin).write(json.dumps({"source": self._source, **limits}).encode() + b"\n")
        return self._process


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> dict[str, str]:
    """Send one line, wait for one line."""
    deadline = time.monotonic() + MAX_SECONDS
    stdin, stdout = _pipe(process.stdin), _pipe(process.stdout)
    stdin.write(line)
    stdin.flush()
    poll = select.poll()
    poll.register(stdout, select.POLLIN)
    reply = bytearray()
    while not reply.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
        chunk = os.read(stdout.fileno(), 1 << 16)
        if not chunk:
            raise EOFError
        reply += chunk
    return cast(dict[str, str], json.loads(reply))


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # by what was buffered for a process that is gone
            _pipe(pipe).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
