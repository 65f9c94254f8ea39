"""The loop of `nf generate`: keeps enough requests in flight, hands results to a sink, stops when told to."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from nf.cli.progress import Progress
from nf.cli.prompts import Job
from nf.cli.sinks import Sink
from nf.errors import InputError
from nf.outputs import RequestOutput
from nf.sampling_params import SamplingParams

DRAIN_SECONDS = 10.0  # what requests in flight get to end by themselves after SIGTERM
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class AsyncModel(Protocol):
    """What is used of AsyncLLM."""

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, stream: bool
    ) -> AsyncGenerator[RequestOutput, None]: ...

    def chat(
        self, messages: Any, sampling_params: SamplingParams, request_id: str, *, stream: bool
    ) -> AsyncGenerator[RequestOutput, None]: ...

    async def close(self) -> None: ...


class Source(Protocol):
    """Where jobs come from."""

    total: int | None

    def read(self) -> AsyncIterator[Job]: ...


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for every job that says nothing else.

    Args:
        params: sampling parameters.
        seed: with a job's index, the key of its sampling.
        chat: a plain prompt is the user's message of a conversation, after ``system`` if there is one.
    """

    params: SamplingParams
    seed: int = 0
    chat: bool = False
    system: str | None = None

    def params_of(self, job: Job) -> SamplingParams:
        """Of this job: its own, and a seed that does not depend on which jobs ran before."""
        from nf.inputs import request_seed

        params = self.params.with_(**job.params)
        return params if params.seed is not None else params.with_(seed=request_seed(self.seed, job.index))

    def messages_of(self, job: Job) -> Sequence[Mapping[str, Any]] | None:
        """The conversation to render, None if the prompt is taken as it is."""
        if "messages" in job.source:
            messages: list[Mapping[str, Any]] = job.source["messages"]
            return messages
        if not self.chat or "prompt" not in job.source:
            return None
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": job.source["prompt"]}]


class BatchRun:
    """One run over all jobs.

    A job that cannot be run is reported to the sink and harms no other. An EngineError ends the run: what was in
    flight is nobody's result, so that resuming tries it again.

    Args:
        limit: most requests in flight.
    """

    def __init__(self, model: AsyncModel, sink: Sink, progress: Progress, defaults: Defaults, *, limit: int) -> None:
        self.stopped_by: int | None = None
        self._model = model
        self._sink = sink
        self._progress = progress
        self._defaults = defaults
        self._slots = asyncio.Semaphore(limit)
        self._all: asyncio.Task[None] | None = None
        self._feeder: asyncio.Task[None] | None = None

    async def run(self, source: Source) -> None:
        """Run every job of ``source`` or, on a signal, those that are done by then; ``stopped_by`` tells which.

        Raises:
            InputError: the source as a whole cannot be used.
            EngineError: the engine failed.
            OSError: a result could not be written.
        """
        loop = asyncio.get_running_loop()
        caught = [s for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # nohup and `&` ignore some
        for signum in caught:
            loop.add_signal_handler(signum, self.stop, signum)
        try:
            self._all = loop.create_task(self._run_all(source))
            with suppress(asyncio.CancelledError):
                await self._all
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            for signum in caught:
                loop.remove_signal_handler(signum)

    def stop(self, signum: int) -> None:
        """Stop at once on Ctrl-C, after a while on SIGTERM and SIGHUP; the second time, without any ceremony."""
        if self.stopped_by is not None:
            os._exit(128 + signum)
        self.stopped_by = signum
        assert self._all is not None
        if signum == signal.SIGINT:
            self._all.cancel()
            return
        print(f"nf generate: stopping; requests in flight get {DRAIN_SECONDS:.0f} s", file=sys.stderr)
        if self._feeder is not None:
            self._feeder.cancel()
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._all.cancel)

    async def _run_all(self, source: Source) -> None:
        async with asyncio.TaskGroup() as group:
            self._feeder = group.create_task(self._feed(source, group))

    async def _feed(self, source: Source, group: asyncio.TaskGroup) -> None:
        async for job in source.read():
            if self._sink.holds(job):
                self._progress.skip()
                continue
            await self._slots.acquire()
            group.create_task(self._run_one(job))

    async def _run_one(self, job: Job) -> None:
        try:
            if job.error is not None:
                raise InputError("", job.error)
            await self._generate(job)
        except InputError as error:
            self._fail(job, str(error).removeprefix(": "))
        finally:
            self._slots.release()

    async def _generate(self, job: Job) -> None:
        params = self._defaults.params_of(job)
        messages = self._defaults.messages_of(job)
        if messages is None:
            prompt = job.source.get("prompt", job.source)
            outputs = self._model.generate(prompt, params, str(job.index), stream=self._sink.streams)
        else:
            outputs = self._model.chat(messages, params, str(job.index), stream=self._sink.streams)
        tokens = 0
        output: RequestOutput | None = None
        async with aclosing(outputs):  # being cancelled aborts the request
            async for output in outputs:
                total = sum(len(o.token_ids) for o in output.outputs)
                self._progress.tokens(total - tokens)
                tokens = total
                self._sink.update(job, output)
        assert output is not None
        self._finish(job, output)

    def _finish(self, job: Job, output: RequestOutput) -> None:
        if any(o.finish_reason == "error" for o in output.outputs):
            self._fail(job, output.error or "the request failed")
            return
        with self._out_of_sight():
            self._sink.finish(job, output)
        self._progress.done(output)

    def _fail(self, job: Job, sentence: str) -> None:
        with self._out_of_sight():
            self._sink.fail(job, sentence)
        self._progress.fail()

    def _out_of_sight(self) -> AbstractContextManager[None]:
        """Keeps the progress bar and what the sink prints from mixing on a terminal."""
        return self._progress.hidden() if self._sink.prints else nullcontext()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
