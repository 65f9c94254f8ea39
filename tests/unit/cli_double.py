"""A model that answers at once: "<prompt>!" and then one token per letter, so results can be told by eye."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from nf.errors import EngineError, InputError
from nf.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nf.sampling_params import SamplingParams


class EchoModel:
    """Stands in for AsyncLLM; the text generated for a prompt is the prompt in capitals, a letter per token."""

    def __init__(self, *, delay: float = 0.0, max_num_seqs: int = 4, dies_at: int | None = None) -> None:
        self.inputs = SimpleNamespace(default_params=SamplingParams(temperature=0.5, top_p=0.9))
        self.loaded = SimpleNamespace(config=SimpleNamespace(max_num_seqs=max_num_seqs))
        self.closed = False
        self.seen: list[tuple[Any, SamplingParams]] = []
        self.aborted: list[str] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.steps = 0
        self._delay = delay
        self._dies_at = dies_at

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, stream: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        self.seen.append((prompt, sampling_params))
        if self._dies_at is not None and len(self.seen) > self._dies_at:
            raise EngineError("the engine failed: the device is gone")
        if prompt == "":
            raise InputError("prompt", "is empty")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            text = prompt.upper() if isinstance(prompt, str) else str(prompt)
            for end in range(1, len(text) + 1):
                await asyncio.sleep(self._delay)
                self.steps += 1
                if stream or end == len(text):
                    yield self._output(request_id, prompt, text, end, sampling_params)
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request_id)
            raise
        finally:
            self.in_flight -= 1

    async def chat(
        self, messages: Any, sampling_params: SamplingParams, request_id: str, *, stream: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        text = "|".join(f"{m['role']}:{m['content']}" for m in messages)
        async for output in self.generate(text, sampling_params, request_id, stream=stream):
            yield output

    async def close(self) -> None:
        self.closed = True

    def _output(self, request_id: str, prompt: Any, text: str, end: int, params: SamplingParams) -> RequestOutput:
        broken = text == "NAN"
        reason = "error" if broken else "length"
        completions = [
            CompletionOutput(
                index=index,
                text=text[:end],
                token_ids=[ord(letter) for letter in text[:end]],
                logprobs=None if params.logprobs is None else [_logprobs(letter) for letter in text[:end]],
                finish_reason=reason if end == len(text) else None,  # type: ignore[arg-type]
            )
            for index in range(params.n)
        ]
        return RequestOutput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=[1, 2, 3],
            outputs=completions,
            finished=end == len(text),
            metrics=RequestMetrics(0.0, 0.0, 0.25, 0.25 + 0.5 * (len(text) - 1)),
            error="the logits held a NaN" if broken else None,
        )


def _logprobs(letter: str) -> dict[int, Logprob]:
    return {ord(letter): Logprob(float("-inf"), 2, letter), 7: Logprob(-0.5, 1, "\a")}
