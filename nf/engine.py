"""Engine: the asyncio loop that forms and launches step i + 1 while step i runs, then hands out step i's tokens.

The host is one step behind (NanoFlow, arXiv 2408.12757, section 4.2, "asynchronous scheduling"): when step i + 1 is
launched, nobody knows yet which sequences step i has ended. Such a sequence computes one surplus token in i + 1,
which is thrown away, and is gone from i + 2. The executor feeds each sampled token to the next step by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from nf.errors import EngineError, InputError
from nf.executors.base import Executor, StepHandle, StepResult
from nf.outputs import RequestOutput
from nf.request import Request
from nf.scheduler.batch import Batch
from nf.scheduler.scheduler import Scheduler
from nf.sequence import RequestState, Sequence

if TYPE_CHECKING:
    from nf.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
logging.getLogger("nf").addHandler(logging.NullHandler())  # unconfigured, Python would print every traceback


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made.

    Args:
        steps: steps launched.
        step_tokens: rows of the dense batch over all steps: prefill, decode, recomputed and surplus tokens.
        requests: requests taken in.
        prompt_tokens: tokens of their prompts.
        output_tokens: tokens handed to sequences.
        surplus_tokens: tokens sampled for a sequence after its last one, because its end was seen one step late.
        aborted_tokens: tokens in flight for sequences that were aborted.
    """

    steps: int = 0
    step_tokens: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    surplus_tokens: int = 0
    aborted_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A launched step. Slots are given to others once a sequence leaves, so their owners at the launch are kept."""

    batch: Batch
    handle: StepHandle
    samples: list[tuple[RequestState, Sequence]]  # owner of each row of batch.sampling
    prompt_logprobs: list[RequestState]  # owner of each row of batch.prompt_logprobs


class Engine:
    """Runs requests on an executor, many at a time, in the order and the shapes that the scheduler decides.

    All methods but the constructor belong to one event loop: the one that runs when the first request is added.

    Args:
        scheduler: decides every step; the engine is the only one to use it.
        executor: runs the steps; the engine closes it.
        tokenizer: makes text of tokens; None leaves texts empty.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, tokenizer: Tokenizer | None = None) -> None:
        self.stats = EngineStats()
        self._scheduler = scheduler
        self._executor = executor
        self._tokenizer = tokenizer
        self._requests: dict[str, RequestState] = {}
        self._failure: BaseException | None = None
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def num_requests(self) -> int:
        """Requests in flight: waiting, running or preempted."""
        return len(self._requests)

    def add(self, request: Request, *, stream: bool = False) -> RequestState:
        """Queue a request; ``stream`` gives news of every token instead of the end alone.

        Raises:
            InputError: its id is in flight already, or it can never fit in the KV pool.
            EngineError: the engine has failed or is closed.
        """
        self.check_open()
        if request.request_id in self._requests:
            raise InputError("request_id", f"{request.request_id!r} is already in flight; ids must be unique")
        state = RequestState(request, self._tokenizer, stream=stream)
        self._scheduler.add(request)
        self._requests[request.request_id] = state
        self.stats.requests += 1
        self.stats.prompt_tokens += request.prompt_len
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="nf-engine")
        self._wake.set()
        return state

    def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort", wherever it stands; an id that is not in flight is ignored."""
        if request_id in self._requests:
            state = self._requests[request_id]
            for sequence in state.sequences:
                if not sequence.finished:
                    sequence.finish("abort")
                    self._leave(state, sequence)

    async def next_output(self, state: RequestState) -> RequestOutput:
        """Wait for news of a request and return everything so far; not streamed, the only news is its end.

        Raises:
            EngineError: the engine failed while the request was in flight.
        """
        await state.news()
        try:
            return state.output()
        except Exception as error:
            logger.exception("request %r failed", state.request.request_id)
            self._fail_request(state, f"its text could not be made: {error}")
            return state.output()

    def check_open(self) -> None:
        """Raise EngineError if the engine cannot take requests here and now."""
        if self._failure is not None:
            raise EngineError(f"the engine has failed and takes no more requests: {self._failure}") from self._failure
        if self._closing is not None:
            raise EngineError("the engine is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise EngineError("the engine belongs to another event loop; one engine serves one loop")

    async def close(self) -> None:
        """Abort what is in flight, wait for the steps already launched and close the executor; idempotent."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close(), name="nf-engine-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for request_id in list(self._requests):
            self.abort(request_id)
        self._wake.set()
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])
        self._executor.close()

    async def _run(self) -> None:
        """The step loop, until close."""
        try:
            running: Step | None = None
            while True:
                launched = self._launch()  # step i + 1, formed and submitted while step i runs
                if running is not None:
                    await self._collect(running)  # step i
                elif launched is None:
                    if self._closing is not None:
                        return
                    await self._idle()
                running = launched
        except Exception as error:
            logger.exception("the engine failed; %d requests in flight end with it", len(self._requests))
            self._fail(error)
        except asyncio.CancelledError:
            self._fail(EngineError("its event loop ended before the engine was closed"))
            raise

    def _launch(self) -> Step | None:
        """Form the next batch and submit it; None if there is nothing to run now."""
        if not self._scheduler.has_work or self._closing is not None:
            return None
        decision = self._scheduler.schedule()
        if decision.empty:  # all that is left waits for what the running step has ended
            return None
        for state, _ in self._owners(decision.preempted):
            state.metrics.preemptions += 1
        batch = self._scheduler.apply(decision)
        samples = self._owners(batch.sampling.slots)
        prompt_logprobs = [state for state, _ in self._owners(batch.prompt_logprobs.slots)]
        self._note_first_scheduled(batch)
        self.stats.steps += 1
        self.stats.step_tokens += batch.num_tokens
        return Step(batch, self._executor.submit(batch), samples, prompt_logprobs)

    async def _collect(self, step: Step) -> None:
        """Wait for a step's tokens and hand them to their sequences; tell the scheduler who has finished."""
        result = await _result(step.handle)
        now = time.monotonic()
        self._collect_prompt_logprobs(step, result)
        logprobs = result.logprobs
        rows = zip(step.samples, result.token_ids.tolist(), strict=True)
        for row, ((state, sequence), token_id) in enumerate(rows):
            if sequence.finish_reason is not None:
                self._count_late_token(sequence)
                continue
            try:
                if token_id < 0:
                    state.error = _no_token(sequence)
                    sequence.finish("error")
                else:
                    if not sequence.token_ids:
                        state.metrics.first_token_time = state.metrics.first_token_time or now
                    self.stats.output_tokens += 1
                    sequence.add(token_id, None if logprobs is None else state.logprobs_of(token_id, logprobs, row))
                if sequence.finish_reason is not None:
                    self._leave(state, sequence)
                elif state.stream:
                    state.notify()
            except Exception as error:  # what one request's text or logprobs can break is that request
                logger.exception("request %r failed", state.request.request_id)
                self._fail_request(state, f"output token {len(sequence.token_ids)} could not be handled: {error}")

    def _collect_prompt_logprobs(self, step: Step, result: StepResult) -> None:
        if result.prompt_logprobs is None:
            return
        positions = step.batch.positions[step.batch.prompt_logprobs.rows] + 1  # a row predicts the token after it
        for row, (state, position) in enumerate(zip(step.prompt_logprobs, positions.tolist(), strict=True)):
            if state.finished:
                continue
            try:
                state.add_prompt_logprobs(position, result.prompt_logprobs, row)
            except Exception as error:
                logger.exception("request %r failed", state.request.request_id)
                self._fail_request(state, f"log-probabilities of prompt token {position} could not be handled: {error}")

    def _fail_request(self, state: RequestState, error: str) -> None:
        """One request cannot go on; all others do."""
        state.fail(error)
        for sequence in state.sequences:
            self._leave(state, sequence)

    def _leave(self, state: RequestState, sequence: Sequence) -> None:
        """A finished sequence leaves the scheduler, and its request the engine with the last one."""
        assert sequence.finished
        if sequence.index in state.scheduled:
            state.scheduled.remove(sequence.index)
            self._scheduler.finish(state.request.request_id, sequence.index)
            if not state.scheduled:
                state.metrics.finished_time = time.monotonic()
                del self._requests[state.request.request_id]
        state.notify()

    def _count_late_token(self, sequence: Sequence) -> None:
        if sequence.finish_reason == "abort":
            self.stats.aborted_tokens += 1
        else:
            self.stats.surplus_tokens += 1

    def _note_first_scheduled(self, batch: Batch) -> None:
        for state, _ in self._owners(batch.slots[batch.num_decode :]):  # those that decode have been scheduled before
            metrics = state.metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or time.monotonic()

    def _owners(self, slots: NDArray[Any]) -> list[tuple[RequestState, Sequence]]:
        owners = self._scheduler.owners(slots.tolist())
        return [(state := self._requests[request_id], state.sequences[index]) for request_id, index in owners]

    async def _idle(self) -> None:
        """Sleep until a request comes or the engine is closed."""
        if self._scheduler.has_work:
            raise RuntimeError("the scheduler has work but forms no step, and no step is running")
        self._wake.clear()
        await self._wake.wait()

    def _fail(self, cause: BaseException) -> None:
        """Everything in flight ends with the cause, and nothing more is taken."""
        self._failure = cause
        for state in self._requests.values():
            state.fail_with_engine(cause)
        self._requests.clear()


def _no_token(sequence: Sequence) -> str:
    return (
        f"output token {len(sequence.token_ids) + 1} of continuation {sequence.index} cannot be sampled: "
        "the model's logits hold a NaN or an infinity, or the parameters leave no token"
    )


async def _result(handle: StepHandle) -> StepResult:
    """Await a step. Unlike asyncio.wrap_future, cancelling the waiting task does not cancel the step."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: StepHandle) -> None:
        with suppress(RuntimeError):  # the loop may be closed by the time the step ends
            loop.call_soon_threadsafe(done.set)

    handle.add_done_callback(wake)
    await done.wait()
    return handle.result()
