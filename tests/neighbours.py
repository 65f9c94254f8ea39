"""Requests whose tokens must stay as they are, whatever goes wrong beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nf import LLM, AsyncLLM, InputError, RequestOutput, SamplingParams

MAX_MODEL_LEN = 512
VOCAB_SIZE = 260
NEIGHBOURS: list[tuple[str, SamplingParams]] = [
    ("def read_lines(path):", SamplingParams(seed=1, max_tokens=150, ignore_eos=True)),
    ("import os", SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)),
    ("x" * 100, SamplingParams(seed=2, n=2, top_p=0.9, max_tokens=150, ignore_eos=True)),
    ("naïve 🙂", SamplingParams(seed=3, repetition_penalty=1.2, max_tokens=150, ignore_eos=True, logprobs=1)),
]

Fault = Callable[[AsyncLLM], Awaitable[None]]


async def last(llm: AsyncLLM, prompt: Any, params: SamplingParams, **how: Any) -> RequestOutput:
    outputs = [output async for output in llm.generate(prompt, params, **how)]
    return outputs[-1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@cache
def undisturbed(model_dir: Path) -> list[list[list[int]]]:
    """Tokens of each neighbour that has an engine for itself."""
    with LLM(model_dir) as llm:
        return [tokens(llm.generate(prompt, params)[0]) for prompt, params in NEIGHBOURS]


def beside_neighbours(model_dir: Path, fault: Fault, **options: Any) -> None:
    """Let ``fault`` happen while the neighbours decode; they come to the same tokens, and every page is free again."""

    async def run() -> list[RequestOutput]:
        async with AsyncLLM(model_dir, **{"max_num_seqs": 16, "max_num_batched_tokens": 64} | options) as llm:
            scheduler = llm.loaded.scheduler
            free = (scheduler.num_free_pages, scheduler.num_free_host_pages)
            tasks = [asyncio.create_task(last(llm, prompt, params)) for prompt, params in NEIGHBOURS]
            await until(lambda: llm.stats.output_tokens > len(NEIGHBOURS))
            assert llm.num_requests == len(NEIGHBOURS)
            await fault(llm)
            outputs = await asyncio.gather(*tasks)
            await until(lambda: not scheduler.has_work)
            scheduler.check()
            assert (scheduler.num_free_pages, scheduler.num_free_host_pages) == free
            assert llm.num_requests == 0
            return outputs

    assert [tokens(output) for output in asyncio.run(run())] == undisturbed(model_dir)


async def refused(llm: AsyncLLM, prompt: Any, message: str, params: dict[str, Any] | None = None) -> None:
    """The request ends with exactly this sentence before it has run a step."""
    requests = llm.stats.requests
    with pytest.raises(InputError) as error:
        await last(llm, prompt, SamplingParams.from_dict(params or {}))
    assert str(error.value) == message
    assert llm.stats.requests == requests
