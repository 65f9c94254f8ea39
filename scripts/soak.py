"""Soak: hours of random arrivals, aborts and preemptions in minutes, and whether everything comes back afterwards.

Requests arrive at random, many at a time; some are aborted while they wait, read their prompt or write; the KV cache is
kept too small for all of them, so that sequences are preempted, some swapped and some recomputed. Every so often the
engine is left alone until it is idle, and then memory, file descriptors, threads and free pages must be what they were
the first time it was. At the end every request has either finished with all its tokens or was aborted by us.

    python scripts/soak.py nf-tiny --seconds 60
    python scripts/soak.py llama-3-8b --random-weights --seconds 600 --num-pages 4000
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import resource
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass

from nf import AsyncLLM, SamplingParams
from nf.bench import card


@dataclass(frozen=True, slots=True)
class Idle:
    """What the process and the card hold while no request is in flight."""

    free_pages: int
    free_host_pages: int
    file_descriptors: int
    threads: int
    host_bytes: int
    gpu_bytes: int | None


def idle_state(llm: AsyncLLM) -> Idle:
    gc.collect()
    scheduler = llm.loaded.scheduler
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    return Idle(
        scheduler.num_free_pages,
        scheduler.num_free_host_pages,
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        resident,
        card.memory_used() if llm.loaded.config.device == "cuda" else None,
    )


def params(rng: random.Random, max_tokens: int) -> SamplingParams:
    """Any mixture of what people ask for."""
    temperature = rng.choice([0.0, 0.7, 1.0])
    return SamplingParams(
        max_tokens=rng.randint(1, max_tokens),
        n=rng.choice([1, 1, 1, 2, 4]) if temperature else 1,
        temperature=temperature,
        top_k=rng.choice([0, 0, 50]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logprobs=rng.choice([None, None, 5]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        seed=rng.randrange(1 << 30),
        ignore_eos=True,
        detokenize=False,
    )


class Soak:
    def __init__(self, llm: AsyncLLM, seed: int, max_prompt: int, max_tokens: int) -> None:
        self.llm, self.rng = llm, random.Random(seed)
        self.max_prompt, self.max_tokens = max_prompt, max_tokens
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []

    async def request(self, index: int) -> None:
        """One request: run to its end, or aborted after a while, by its id or by leaving the iteration."""
        rng, request_id = self.rng, f"soak-{index}"
        vocab_size = self.llm.loaded.model_config.vocab_size
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, self.max_prompt))]
        asked, ends = params(rng, self.max_tokens), rng.choice(["itself"] * 6 + ["abort", "leave"])
        outputs = self.llm.generate(prompt, asked, request_id, stream=ends != "itself")
        aborting = asyncio.create_task(self.abort_later(request_id)) if ends == "abort" else None
        leave_after, last = rng.randint(1, 20), None
        async for output in outputs:
            last = output
            leave_after -= 1
            if ends == "leave" and not leave_after:
                break
        await outputs.aclose()
        if aborting is not None:
            await aborting
        self.counts["requests"] += 1
        reasons = [completion.finish_reason for completion in last.outputs] if last else []
        self.counts.update(str(reason) for reason in reasons)
        if last is not None:
            self.counts["preemptions"] += last.metrics.preemptions if last.metrics else 0
        whole = all(len(completion.token_ids) == asked.max_tokens for completion in last.outputs) if last else False
        if ends == "itself" and not (whole and set(reasons) == {"length"}):
            self.lost.append(f"{request_id}: {reasons}")

    async def abort_later(self, request_id: str) -> None:
        """At once, while it waits, or when it has got somewhere."""
        await asyncio.sleep(self.rng.choice([0.0, 0.02, 0.2, 1.0]) * self.rng.random())
        await self.llm.abort(request_id)

    async def burst(self, seconds: float, rate: float) -> None:
        """Requests at random moments for a while, then quiet until all of them are gone."""
        tasks, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            tasks.append(asyncio.create_task(self.request(self.counts["made"])))
            self.counts["made"] += 1
            await asyncio.sleep(self.rng.expovariate(rate))
        await asyncio.gather(*tasks)
        while self.llm.num_requests:
            await asyncio.sleep(0.01)


async def soak(args: argparse.Namespace) -> int:
    options = {} if args.num_pages is None else {"num_pages": args.num_pages}
    async with AsyncLLM(
        args.model,
        random_weights=args.random_weights,
        skip_tokenizer_init=True,
        device=args.device,
        max_model_len=args.max_prompt + args.max_tokens,
        **options,
    ) as llm:
        run = Soak(llm, args.seed, args.max_prompt, args.max_tokens)
        await run.burst(min(5.0, args.seconds / 4), args.rate)  # first use allocates
        before = idle_state(llm)
        started = time.monotonic()
        while time.monotonic() - started < args.seconds:
            await run.burst(args.burst, args.rate)
            print(f"{time.monotonic() - started:6.0f} s {dict(run.counts)}", file=sys.stderr, flush=True)
        await asyncio.sleep(0.2)
        after = idle_state(llm)
    print(f"model {args.model} on {llm.loaded.config.device}, {args.seconds:.0f} s: {dict(run.counts)}")
    for name, value in asdict(before).items():
        print(f"  {name:18} {value} before, {getattr(after, name)} after")
    grown = after.host_bytes - before.host_bytes
    wrong = [
        *run.lost[:5],
        *(
            f"{name} changed"
            for name in ("free_pages", "free_host_pages", "file_descriptors", "threads", "gpu_bytes")
            if getattr(before, name) != getattr(after, name)
        ),
        *([f"host memory grew by {grown >> 20} MiB"] if grown > 64 << 20 else []),
    ]
    print("everything came back" if not wrong else f"NOT CLEAN: {'; '.join(wrong)}")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory, bundled model or, with --random-weights, a shape")
    parser.add_argument("--random-weights", action="store_true", help="draw weights instead of reading them")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default 600)")
    parser.add_argument("--burst", type=float, default=20.0, help="seconds of arrivals between idle moments")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second (default 20)")
    parser.add_argument("--max-prompt", type=int, default=400, help="tokens (default 400)")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens (default 200)")
    parser.add_argument("--num-pages", type=int, help="KV pages; few make sequences be preempted")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    return asyncio.run(soak(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
