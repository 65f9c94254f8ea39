"""Soak: hours of random arrivals, aborts and preemptions in minutes, and whether everything comes back afterwards.

Requests of every kind arrive at random, faster than they are served. Some are aborted, or nobody waits for them any
more, while they are made ready, wait, read their prompt, write or stand preempted. The KV cache is too small for those
that run, and the host's pages for those that are preempted: who is preempted is swapped while they last, whatever it
costs, and recomputed after that. Few tokens fit in a step, so that prompts are read in chunks. Between bursts the
engine is left alone until it is idle: pages must then be free as they were at the beginning, and file descriptors,
threads and memory must not have grown.

    python scripts/soak.py nf-tiny --seconds 30
    python scripts/soak.py nf-tiny --device cuda --rate 100
    python scripts/soak.py llama-3-8b --random-weights --rate 25 --burst 10 --max-prompt 3000 --max-tokens 1000 \\
        --max-num-batched-tokens 2048 --num-pages 4000 --num-host-pages 500

Fails if a request ends in another way than it should or does not end, if something does not come back, or if one of
these situations never came up.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nf import AsyncLLM, SamplingParams
from nf.bench import card
from nf.bench.environment import environment, write_record
from nf.cli.files import check_writable
from nf.cli.options import add_engine_options, engine_options, named_by_flag
from nf.cli.parser import CommandParser
from nf.errors import InputError, NfError
from nf.outputs import RequestOutput
from nf.scheduler.state import Status

PHASES = ("preparing", "waiting", "prefill", "decode", "preempted")  # of a request, where one may be ended
WAYS = ("abort", "cancel")  # by its id, or by cancelling whoever waits for it
SEQUENCES = 3  # of the longest kind: so many fit in the KV cache by default, and a sixth of it on the host
DENSE_BATCH_SIZE = 64  # by default
GROWTH = {"file_descriptors": 2, "threads": 2, "host_bytes": 64 << 20, "gpu_bytes": 64 << 20}  # at most
MOST_WRONG = 10  # sentences, then it is enough
NUMBERS = ("seconds", "burst", "rate", "max_prompt", "max_tokens", "patience")


@dataclass(frozen=True, slots=True)
class Idle:
    """What the process and the card hold while no request is in flight."""

    free_pages: int
    free_host_pages: int
    file_descriptors: int
    threads: int
    host_bytes: int
    gpu_bytes: int

    def wrong(self, now: Idle) -> list[str]:
        """Sentences about what has not come back since."""
        found = []
        for name, before in asdict(self).items():
            after = getattr(now, name)
            if after - before > GROWTH.get(name, 0) or (name not in GROWTH and after != before):
                found.append(f"{name} was {before:,} and is {after:,}")
        return found


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
        (card.memory_used() or 0) if llm.loaded.config.device == "cuda" else 0,
    )


def params(rng: random.Random, max_tokens: int, long: bool) -> SamplingParams:
    """Any mixture of what people ask for; mostly short outputs, so that the long ones are not foreseen."""
    temperature = rng.choice([0.0, 0.7, 1.0])
    return SamplingParams(
        max_tokens=max_tokens if long else rng.randint(1, 1 + max_tokens // 16),
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
    """Requests on an engine, what became of them, and what went wrong.

    Args:
        max_prompt, max_tokens: tokens of the longest prompt and output.
        patience: seconds after which a request counts as lost.
    """

    def __init__(self, llm: AsyncLLM, *, seed: int, max_prompt: int, max_tokens: int, patience: float) -> None:
        self.llm, self.rng, self.patience = llm, random.Random(seed), patience
        self.max_prompt, self.max_tokens = max_prompt, max_tokens
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.outputs: dict[str, RequestOutput] = {}  # the latest of each request in flight

    async def request(self) -> None:
        """One request: to its end, aborted in some phase, or left by whoever reads it."""
        rng, request_id = self.rng, f"soak-{self.counts['requests']}"
        self.counts["requests"] += 1
        fate, phase = self.fate()
        asked = params(rng, self.max_tokens, long=phase == "preempted" or rng.random() < 0.2)
        outputs_until = rng.randint(1, 20) if fate == "leave" else None
        reading = asyncio.create_task(self.read(request_id, asked, outputs_until))
        early = False
        try:
            async with asyncio.timeout(self.patience):
                early = fate in WAYS and await self.end_early(request_id, fate, phase, reading)
                await reading
        except TimeoutError:
            reading.cancel()
            self.wrong.append(f"{request_id} has not ended after {self.patience:g} s")
        except asyncio.CancelledError:
            if not early:
                raise
        except NfError as error:
            self.wrong.append(f"{request_id}: {error}")
        else:
            self.judge(request_id, asked, "end" if fate in WAYS and not early else fate)
        self.outputs.pop(request_id, None)

    def fate(self) -> tuple[str, str]:
        """What is to become of the next request, and in which phase; what has not come up yet is tried first."""
        every = [(way, phase) for way in WAYS for phase in PHASES]
        early = [(way, phase) for way, phase in every if not self.counts[f"{way} in {phase}"]] or every
        return self.rng.choice([("end", "")] * 5 + [("leave", "")] * 2 + [self.rng.choice(early)] * 3)

    async def read(self, request_id: str, asked: SamplingParams, outputs_until: int | None) -> None:
        """Read a request's outputs, so many of them or all."""
        vocab_size = self.llm.loaded.model_config.vocab_size
        prompt = [self.rng.randrange(vocab_size) for _ in range(self.rng.randint(1, self.max_prompt))]
        outputs = self.llm.generate(prompt, asked, request_id, stream=outputs_until is not None)
        count = 0
        try:
            async for output in outputs:
                self.outputs[request_id] = output
                count += 1
                if count == outputs_until:
                    break
        finally:
            await outputs.aclose()

    async def end_early(self, request_id: str, way: str, phase: str, reading: asyncio.Task[None]) -> bool:
        """Abort or cancel a request once it is in ``phase``; whether it ever was."""
        await asyncio.sleep(0)  # it begins
        while not reading.done() and self.phase(request_id) != phase:
            await asyncio.sleep(0.001)
        if reading.done():
            return False
        self.counts[f"{way} in {phase}"] += 1
        if way == "abort":
            await self.llm.abort(request_id)
        else:
            reading.cancel()
        return True

    def phase(self, request_id: str) -> str:
        """One of PHASES, by the request's furthest sequence; "" if its last token is on its way."""
        statuses = self.llm.loaded.scheduler.statuses(request_id)
        if statuses is None:
            return "preparing"
        if Status.PREEMPTED in statuses:
            return "preempted"
        if Status.DECODE in statuses:
            return "decode"
        return "waiting" if not statuses else "prefill" if Status.PREFILL in statuses else ""

    def judge(self, request_id: str, asked: SamplingParams, fate: str) -> None:
        """Whether a request that was read to where its reader wanted came out as it should."""
        output = self.outputs[request_id]
        reasons = {completion.finish_reason for completion in output.outputs}
        lens = {len(completion.token_ids) for completion in output.outputs}
        whole = output.finished and reasons == {"length"} and lens == {asked.max_tokens}
        cut = output.finished and "abort" in reasons and reasons <= {"abort", "length"}
        right = {"end": whole, "leave": whole or not output.finished, "abort": cut, "cancel": False}[fate]
        self.counts["whole" if whole else "cut" if cut else "left" if not output.finished else "wrong"] += 1
        if not right:
            self.wrong.append(f"{request_id} ({fate}) of {asked.max_tokens} tokens ended with {reasons} after {lens}")

    async def burst(self, seconds: float, rate: float) -> Idle:
        """Requests at random moments for a while, then quiet until all of them are gone."""
        async with asyncio.TaskGroup() as group:
            for _ in range(8):  # at once, so that every thread there can be is there
                group.create_task(self.request())
            end = time.monotonic() + seconds
            while time.monotonic() < end and len(self.wrong) < MOST_WRONG:
                await asyncio.sleep(self.rng.expovariate(rate))
                group.create_task(self.request())
        end = time.monotonic() + self.patience
        while self.llm.num_requests and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if self.llm.num_requests:
            self.wrong.append(f"{self.llm.num_requests} requests are still in flight though nobody waits for them")
        await asyncio.sleep(0.2)  # the last step may still run, for nobody
        try:
            self.llm.loaded.scheduler.check()
        except AssertionError as error:
            self.wrong.append(f"the scheduler's state does not hold together: {error}")
        return idle_state(self.llm)

    def never_seen(self) -> list[str]:
        """Situations that it is all about and that did not come up."""
        counters = self.llm.loaded.scheduler.counters
        seen = self.counts | Counter({"swap": counters.swapped, "recomputation": counters.recomputed})
        wanted = ["whole", "left", "swap", "recomputation", *(f"{way} in {phase}" for way in WAYS for phase in PHASES)]
        return [name for name in wanted if not seen[name]]


async def soak(model: str, options: dict[str, Any], args: Any) -> bool:
    """Run and report; whether all is well."""
    async with AsyncLLM(model, **options) as llm:
        run = Soak(llm, seed=args.seed, max_prompt=args.max_prompt, max_tokens=args.max_tokens, patience=args.patience)
        record = _head(model, llm, args)
        started = time.monotonic()
        first = last = await run.burst(min(args.burst, args.seconds / 4), args.rate)  # first use allocates
        while not run.wrong:
            last = await run.burst(args.burst, args.rate)
            run.wrong += first.wrong(last)
            passed = time.monotonic() - started
            print(f"{passed:6.0f} s {_line(run)}", file=sys.stderr, flush=True)
            if args.json is not None:  # at once: it may be stopped before its end
                write_record(args.json, record | {"results": _results(run, passed, first, last)})
            if passed >= args.seconds * (2 if run.never_seen() else 1):
                break
        results = _results(run, time.monotonic() - started, first, last)
    if args.json is not None:
        write_record(args.json, record | {"results": results})
    print(f"{model} on {llm.loaded.config.device}, {results['seconds']:.0f} s: {_line(run)}")
    for name, value in asdict(first).items():
        print(f"  {name:18}{value:>16,} at first {getattr(last, name):>16,} at last")
    print("\n".join(f"WRONG: {sentence}" for sentence in results["wrong"]) or "everything came back")
    return not results["wrong"]


def _head(model: str, llm: AsyncLLM, args: Any) -> dict[str, Any]:
    """What is run, and where."""
    asked = {name: getattr(args, name) for name in NUMBERS}
    options = asdict(llm.loaded.config)
    return {"benchmark": "soak", "environment": environment(), "model": model, "options": options, "asked": asked}


def _results(run: Soak, seconds: float, first: Idle, last: Idle) -> dict[str, Any]:
    """What came of it so far."""
    wrong = run.wrong[:MOST_WRONG] or [f"never seen: {name}" for name in run.never_seen()]
    idle = {"first": asdict(first), "last": asdict(last)}
    return {"seconds": seconds, "counts": _counts(run), "idle": idle, "wrong": wrong}


def _counts(run: Soak) -> dict[str, int]:
    counters, stats = run.llm.loaded.scheduler.counters, run.llm.stats
    counts = {**run.counts, "swapped": counters.swapped, "recomputed": counters.recomputed}
    return dict(sorted((counts | {"steps": stats.steps, "output tokens": stats.output_tokens}).items()))


def _line(run: Soak) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in _counts(run).items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", help="model directory, bundled model or, with --random-weights, a shape")
    parser.add_argument("--random-weights", action="store_true", help="draw weights instead of reading them")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        help="how long (default 600); until every situation has come up, up to twice that",
    )
    parser.add_argument("--burst", type=float, default=20.0, help="seconds of arrivals between idle moments")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second (default 20)")
    parser.add_argument("--max-prompt", type=int, default=150, help="tokens (default 150)")
    parser.add_argument("--max-tokens", type=int, default=300, help="tokens (default 300)")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds a request may take (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record, after every burst")
    add_engine_options(parser)
    args = parser.parse_args(argv)
    for name in NUMBERS:
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: must be above 0, not {getattr(args, name):g}")
    try:
        check_writable("--json", args.json)
        longest = args.max_prompt + args.max_tokens
        options = {"max_num_batched_tokens": DENSE_BATCH_SIZE, "max_model_len": longest, **engine_options(args)}
        pages = SEQUENCES * -(-longest // options.get("page_size", 16))
        options = {"num_pages": pages, "num_host_pages": pages // 6, "preemption": "swap", **options}
        with named_by_flag():
            options |= {"random_weights": args.random_weights, "skip_tokenizer_init": True}
            return 0 if asyncio.run(soak(args.model, options, args)) else 1
    except NfError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
