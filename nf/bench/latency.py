"""``nf bench latency``: requests that arrive at random moments, and how long each has to wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nf.bench.engine import WARMUP_OUTPUT_LEN, Subject
from nf.bench.metrics import Times, summaries, times
from nf.bench.workload import Workload
from nf.llm import AsyncLLM
from nf.sampling_params import SamplingParams

Float64: TypeAlias = "NDArray[np.float64]"


def poisson_arrivals(count: int, rate: float, seed: int = 0) -> Float64:
    """Moments of ``count`` arrivals of a Poisson process of ``rate`` per second, in seconds from the first.

    The same seed gives the same pattern at every rate, stretched.
    """
    gaps = np.random.default_rng([seed, 2]).exponential(1.0, count)
    gaps[0] = 0.0
    moments: Float64 = np.cumsum(gaps) / rate
    return moments


async def warm_up(llm: AsyncLLM, subject: Subject, workload: Workload, count: int = 8) -> None:
    """Run a few short requests at once, and forget them."""
    prompts, params = subject.requests(workload.warmup(count, WARMUP_OUTPUT_LEN))
    await _replay(llm, prompts, params, np.zeros(len(prompts)), lambda: None)


async def run_rate(
    llm: AsyncLLM,
    subject: Subject,
    workload: Workload,
    rate: float,
    *,
    detokenize: bool = False,
    finished: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Give the requests as a Poisson process and wait for all of them.

    Latencies count from the moment a request was to arrive: if the loop is late to make it, that is waiting too.

    Args:
        rate: requests per second.
        detokenize: make texts of the outputs as well.
        finished: called as each request ends.

    Returns:
        The rates asked for and achieved (requests from the first arrival to the last token), output tokens per second
        and summaries in seconds.
    """
    prompts, params = subject.requests(workload, detokenize=detokenize)
    arrivals = poisson_arrivals(len(workload), rate, workload.seed)
    subject.log.start()
    with subject.power_meter() as meter:
        all_times = await _replay(llm, prompts, params, arrivals, finished)
    seconds = max(arrival + one.latency for arrival, one in zip(arrivals.tolist(), all_times, strict=True))
    tokens = workload.input_tokens + workload.output_tokens
    return {
        "request_rate": rate,
        "achieved_rate": len(workload) / seconds,
        "seconds": seconds,
        "output_tokens_per_second": workload.output_tokens / seconds,
        "joules_per_token": meter.watts * seconds / tokens,
        "watts": meter.watts,
        **summaries(all_times),
        "steps": {"count": len(subject.log.records)},
    }


async def _replay(
    llm: AsyncLLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    arrivals: Float64,
    finished: Callable[[], object],
) -> list[Times]:
    """Make each request at its moment; times in the order of the requests."""
    start = time.monotonic()

    async def one(prompt: list[int], params: SamplingParams, arrival: float) -> Times:
        async for output in llm.generate(prompt, params, stream=False):
            finished()
            return times(output, arrival)
        raise AssertionError("a request ended without an output")

    tasks = []
    try:
        async with asyncio.TaskGroup() as group:
            for prompt, own, moment in zip(prompts, params, arrivals.tolist(), strict=True):
                await asyncio.sleep(max(0.0, start + moment - time.monotonic()))
                tasks.append(group.create_task(one(prompt, own, start + moment)))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
