"""LLM and AsyncLLM: text or token ids in, RequestOutputs out."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, Unpack

from nf.engine import Engine, EngineStats
from nf.errors import InputError
from nf.inputs import Messages, Prompt, Ticket, template_variables
from nf.loading import Loaded, Options, load
from nf.loop_thread import LoopThread
from nf.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from nf.progress_bar import progress_bar
from nf.request import Request
from nf.sampling_params import SamplingParams
from nf.sequence import RequestState


class AsyncLLM:
    """A model that serves many requests at a time, for asynchronous callers.

    Loading happens in the constructor and blocks; everything else belongs to one event loop, the one that runs when
    the first request is made. Use it as ``async with AsyncLLM(model) as llm`` or call ``close()``.

    Args:
        model: a model directory, a bundled model's name or a hub name.
        options: as for :class:`LLM`.

    Raises:
        InputError: an option is unknown or not acceptable.
        ModelError: the model cannot be used.
        PlanError: the pipeline plan does not suit the model.
    """

    def __init__(self, model: str | os.PathLike[str] | Loaded, **options: Unpack[Options]) -> None:
        self.loaded = model if isinstance(model, Loaded) else load(model, **options)
        self.inputs = self.loaded.inputs
        self._engine = Engine(self.loaded.scheduler, self.loaded.executor, self.loaded.tokenizer)
        self._text_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="nf-text")
        self._preparing: dict[str, bool] = {}  # requests being tokenized: whether they were aborted meanwhile

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was made."""
        return self._engine.stats

    @property
    def num_requests(self) -> int:
        """Requests in flight: waiting, running or preempted."""
        return self._engine.num_requests

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        stream: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt; leaving the iteration early aborts the request.

        Args:
            prompt: a text, token ids, or a mapping with ``prompt_token_ids`` or ``prompt``.
            sampling_params: None takes the model's own defaults, with ``max_tokens`` 16.
            request_id: unique among the requests in flight; None makes one.
            stream: False yields the finished output alone, and saves the host the work of making the others.

        Yields:
            Everything generated so far; the last output is ``finished``. A slow consumer gets fewer, larger steps.

        Raises:
            InputError: the prompt or a parameter is not acceptable, or the request can never fit in the KV pool.
            EngineError: the engine failed or is closed.
        """
        return self._outputs(
            request_id, stream, lambda ticket: self.inputs.request("prompt", prompt, sampling_params, ticket)
        )

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        stream: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Like :meth:`generate` for a conversation; what shapes its text is as in :meth:`LLM.chat`."""
        template = template_variables(add_generation_prompt, tools, chat_template_kwargs)
        return self._outputs(
            request_id,
            stream,
            lambda ticket: self.inputs.chat_request("messages", messages, sampling_params, ticket, template),
        )

    async def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort", wherever it stands; an id that is not in flight is ignored."""
        if request_id in self._preparing:
            self._preparing[request_id] = True
        self._engine.abort(request_id)

    async def close(self) -> None:
        """End what is in flight with finish_reason "abort" and free everything; idempotent."""
        await self._engine.close()
        self._text_threads.shutdown(wait=False)
        self.inputs.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def complete(self, request: Request, finished: Callable[[RequestOutput], None]) -> RequestOutput:
        """The last output of a request that is checked already; one that can never run ends with "error"."""
        try:
            state = self._engine.add(request)
        except InputError as error:
            output = _ended(request, "error", str(error))
        else:
            try:
                output = await self._engine.next_output(state)
            finally:
                self._abandon(state)
        finished(output)
        return output

    async def _outputs(
        self, request_id: str | None, stream: bool, prepare: Callable[[Ticket], Request]
    ) -> AsyncGenerator[RequestOutput, None]:
        self._engine.check_open()
        ticket = self.inputs.ticket(request_id)
        if ticket.request_id in self._preparing:
            raise InputError("request_id", f"{ticket.request_id!r} is already in flight; ids must be unique")
        self._preparing[ticket.request_id] = False
        try:
            request = await asyncio.get_running_loop().run_in_executor(self._text_threads, prepare, ticket)
        except InputError:
            self._engine.check_open()  # closing ends a template that is being rendered
            raise
        finally:
            aborted = self._preparing.pop(ticket.request_id)
        if aborted:
            yield _ended(request, "abort")
            return
        state = self._engine.add(request, stream=stream)
        try:
            while not state.delivered:
                yield await self._engine.next_output(state)
        finally:
            self._abandon(state)

    def _abandon(self, state: RequestState) -> None:
        """Nobody waits for this request any more."""
        if not state.finished:
            self._engine.abort(state.request.request_id)


class LLM:
    """A model that generates for lists of prompts, for synchronous callers: scripts, notebooks, threads.

    It is an :class:`AsyncLLM` on an event loop of its own thread; several threads may call it at a time. Use it as
    ``with LLM(model) as llm`` or call ``close()``; at the latest the end of the program does.

    Args:
        model: a model directory, a bundled model's name or a hub name; with ``random_weights`` also a well-known
            shape's name such as "llama-3-8b", which has no tokenizer.
        tokenizer: directory or hub name of the tokenizer, if it is not the model's.
        chat_template: source of a template that replaces the model's.
        skip_tokenizer_init: take and give token ids only.
        dtype: what weights are rounded to: "auto", "bfloat16", "float16" or "float32". The CPU computes in float32;
            the GPU has bfloat16 alone.
        seed: keys the sampling of requests that name no seed, by their running number.
        max_model_len: most tokens of prompt and output together; None takes what the model allows.
        max_num_seqs: most sequences that run at once; None: 256 on the CPU, 2048 on the GPU, if the dense batch has
            as many rows.
        max_num_batched_tokens: size of the dense batch, tokens per step.
        page_size: tokens per page of the KV cache; 16, 32 or 64 on the GPU.
        num_pages, num_host_pages: sizes of the KV cache on the device and, for preempted sequences, on the host.
        preemption: what happens to the KV of a preempted sequence: "swap", "recompute", or "auto" for the cheaper one.
        gpu_memory_utilization: share of the GPU's memory to use; what others use of it counts as well.
        tensor_parallel_size: GPUs that share the model; 1.
        device: "auto", "cpu" or "cuda"; "auto" takes the GPU if there is one that can run the model.
        plan: "sequential", "nano-batch" or a JSON file.
        random_weights: draw the weights, keyed by ``seed``, instead of reading them; for benchmarks.

    Raises:
        InputError: an option is unknown or not acceptable.
        ModelError: the model cannot be used.
        PlanError: the pipeline plan does not suit the model.
    """

    def __init__(self, model: str | os.PathLike[str] | Loaded, **options: Unpack[Options]) -> None:
        self._llm = AsyncLLM(model, **options)
        self._thread = LoopThread("nf-engine")
        self._close = weakref.finalize(self, self._thread.stop, self._llm.close)

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was made."""
        return self._llm.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many; every input is checked before any is started.

        Args:
            prompts: texts, lists of token ids or mappings with ``prompt_token_ids`` or ``prompt``; a text, a flat list
                of token ids or a mapping alone is one prompt.
            sampling_params: for all prompts, or a list with one for each; None takes the model's own defaults, with
                ``max_tokens`` 16.
            use_tqdm: show progress on stderr if it is a terminal.

        Returns:
            One output per prompt, in their order. A request that fails alone has finish_reason "error" and ``error``.

        Raises:
            InputError: a prompt or parameter is not acceptable; nothing was started.
            EngineError: the engine failed or is closed.
        """
        self._thread.check_open()
        return self._run(self._llm.inputs.requests(prompts, sampling_params), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation or many, as :meth:`generate` does.

        Args:
            messages: mappings with ``role`` and ``content``; a list of such lists is many conversations.
            sampling_params: as for :meth:`generate`.
            use_tqdm: as for :meth:`generate`.
            add_generation_prompt: end the text where the assistant's answer begins.
            tools: JSON descriptions of functions.
            chat_template_kwargs: further variables of the model's own template, e.g. ``enable_thinking``.
        """
        self._thread.check_open()
        template = template_variables(add_generation_prompt, tools, chat_template_kwargs)
        return self._run(self._llm.inputs.chat_requests(messages, sampling_params, template), use_tqdm)

    def close(self) -> None:
        """End what is in flight with finish_reason "abort" and free everything; idempotent."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        with progress_bar(len(requests), show=use_tqdm) as finished:
            return self._thread.run(_complete_all(self._llm, requests, finished))


async def _complete_all(
    llm: AsyncLLM, requests: list[Request], finished: Callable[[RequestOutput], None]
) -> list[RequestOutput]:
    return await asyncio.gather(*(llm.complete(request, finished) for request in requests))


def _ended(request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput:
    """The output of a request that never ran."""
    now = time.monotonic()
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids.tolist(),
        outputs=[CompletionOutput(index, finish_reason=reason) for index in range(request.params.n)],
        finished=True,
        metrics=RequestMetrics(arrival_time=request.arrival_time, finished_time=now),
        error=error,
    )
