"""Host time of a decoding step: the whole engine on an executor that computes nothing and is done at once.

    python scripts/bench_host.py                          # one sequence
    python scripts/bench_host.py --running 680 --stream

All sequences decode in every step measured, and each has a consumer of its own. The time is from one submitted step to
the next: tokens handed to their sequences, the next step decided, its arrays built. It bounds TPOT from below.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from concurrent.futures import Future

import numpy as np

from nf.cli.parser import CommandParser
from nf.engine import Engine
from nf.executors.base import StepHandle, StepResult
from nf.request import Request
from nf.sampling_params import SamplingParams
from nf.scheduler.batch import Batch
from nf.scheduler.scheduler import Scheduler, SchedulerConfig

PROMPT_LEN = 16
PAGE_SIZE = 16


class NoExecutor:
    """Samples token 1 everywhere, and notes when it was given steps that are all decode."""

    page_size, num_pages, num_host_pages = PAGE_SIZE, 0, 0

    def __init__(self, running: int) -> None:
        self.submitted: list[float] = []
        self._running = running

    def submit(self, batch: Batch) -> StepHandle:
        if batch.num_decode == self._running:
            self.submitted.append(time.perf_counter())
        handle: StepHandle = Future()
        handle.set_result(StepResult(np.ones(len(batch.sampling.rows), np.int32), None, None))
        return handle

    def close(self) -> None:
        pass


async def measure(args: argparse.Namespace) -> dict[str, object]:
    max_tokens = args.steps + 2  # the first comes from the prompt, and a step's time ends with the next one's submit
    max_len = PROMPT_LEN + max_tokens
    slots = max(args.running, 1024)
    config = SchedulerConfig(
        max_num_seqs=slots,
        dense_batch_size=max(args.running * PROMPT_LEN, slots),  # all prompts in the first step
        max_model_len=max_len,
        page_size=PAGE_SIZE,
        num_pages=2 * args.running * -(-max_len // PAGE_SIZE),  # so many that nobody waits for any
    )
    executor = NoExecutor(args.running)
    engine = Engine(Scheduler(config), executor)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)

    async def consume(index: int) -> None:
        request = Request(str(index), np.ones(PROMPT_LEN, np.int32), params, seed=index)
        state = engine.add(request, stream=args.stream)
        while not state.delivered:
            await engine.next_output(state)

    await asyncio.gather(*map(consume, range(args.running)))
    await engine.close()
    times = 1e6 * np.diff(executor.submitted)
    assert len(times) == args.steps, "some step did not decode all sequences"
    return {
        "running": args.running,
        "stream": args.stream,
        "steps": len(times),
        "median_us": round(float(np.median(times)), 1),
        "p99_us": round(float(np.percentile(times, 99)), 1),
    }


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--running", type=int, default=1, help="sequences that decode (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="steps measured (default %(default)s)")
    parser.add_argument("--stream", action="store_true", help="every sequence gives news of every token")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    for name in ("running", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: must be at least 1, not {getattr(args, name)}")
    result = asyncio.run(measure(args))
    if args.json:
        print(json.dumps(result))
        return 0
    for name, value in result.items():
        print(f"{name.replace('_', ' '):9}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
