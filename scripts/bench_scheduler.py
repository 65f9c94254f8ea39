"""Time of one scheduling step (schedule + apply, which builds the batch arrays) at steady state, without an executor.

    python scripts/bench_scheduler.py                    # 1,024 running, 64 waiting requests
    python scripts/bench_scheduler.py --running 256 --json

Prompts have 512 … 1,536 tokens, outputs --output on average (exponentially distributed, as chat traffic is). Requests
finish and are replaced as the steps go by, so the queue never runs dry. The dense batch is large enough for prefill to
keep up, so all slots decode. The figure to hold: 2 ms median, which is 4 % of a 50 ms step.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from nf.cli.parser import CommandParser
from nf.errors import InputError
from nf.request import Request
from nf.sampling_params import SamplingParams
from nf.scheduler import scheduler as scheduler_module
from nf.scheduler.batch import Batch
from nf.scheduler.building import build_batch
from nf.scheduler.scheduler import Scheduler, SchedulerConfig

STEP_MS = 50.0
STOP_TOKEN = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one step."""

    schedule: float
    apply: float
    arrays: float  # of apply: building the batch
    finish: float  # ends of sequences and new arrivals, outside the figure
    decodes: int
    prefill_tokens: int


class Load:
    """Keeps a scheduler busy: finishes sequences at lengths drawn beforehand and refills the queue."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.rng = np.random.default_rng(args.seed)
        self.args = args
        tokens_per_seq = 1024 + args.output  # mean context at its end
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=args.running,
                dense_batch_size=args.dense_batch_size,
                max_model_len=args.max_model_len,
                page_size=args.page_size,
                num_pages=int(args.running * tokens_per_seq * args.memory / args.page_size),
                num_host_pages=args.running * 8,
                swap_cost_per_page=2.0 * args.page_size,
                recompute_cost_per_token=8.0,
            )
        )
        self.params = SamplingParams(
            max_tokens=4 * args.output,
            temperature=0.8,
            top_p=0.95,
            min_tokens=args.output if args.rare else 0,
            logit_bias={7: 1.0, 9: -1.0} if args.rare else None,
        )
        self.count = 0
        self.arrays = 0.0  # seconds the last step took to build its batch
        scheduler_module.build_batch = self.timed_build_batch
        self.left: dict[str, int] = {}  # request_id → tokens until it ends

    def timed_build_batch(self, *args: Any) -> Batch:
        start = time.perf_counter()
        batch = build_batch(*args)
        self.arrays = time.perf_counter() - start
        return batch

    def refill(self) -> None:
        while self.scheduler.num_waiting < self.args.waiting:
            request_id = f"request-{self.count}"
            self.count += 1
            prompt = np.full(self.rng.integers(512, 1537), 5, np.int32)
            self.scheduler.add(Request(request_id, prompt, self.params, seed=self.count, stop_token_ids=(STOP_TOKEN,)))
            self.left[request_id] = int(np.clip(self.rng.exponential(self.args.output), 1, 4 * self.args.output))

    def collect(self, batch: Batch) -> None:
        """What the engine does a step late: count tokens, let ended sequences go."""
        for request_id, index in self.scheduler.owners(batch.sampling.slots.tolist()):
            self.left[request_id] -= 1
            if self.left[request_id] == 0:
                del self.left[request_id]
                self.scheduler.finish(request_id, index)

    def step(self) -> Timing:
        start = time.perf_counter()
        decision = self.scheduler.schedule()
        decided = time.perf_counter()
        batch = self.scheduler.apply(decision)
        applied = time.perf_counter()
        self.collect(batch)
        self.refill()
        return Timing(
            schedule=decided - start,
            apply=applied - decided,
            arrays=self.arrays,
            finish=time.perf_counter() - applied,
            decodes=batch.num_decode,
            prefill_tokens=batch.num_tokens - batch.num_decode,
        )


def measure(args: argparse.Namespace) -> dict[str, object]:
    load = Load(args)
    load.refill()
    for _ in range(args.warmup):
        load.step()
    timings = [load.step() for _ in range(args.steps)]
    total = 1e3 * np.array([t.schedule + t.apply for t in timings])
    median = float(np.median(total))
    counters = load.scheduler.counters
    return {
        "median_ms": round(median, 3),
        "p99_ms": round(float(np.percentile(total, 99)), 3),
        "percent_of_50_ms_step": round(100 * median / STEP_MS, 2),
        "schedule_median_ms": round(1e3 * float(np.median([t.schedule for t in timings])), 3),
        "apply_state_median_ms": round(1e3 * float(np.median([t.apply - t.arrays for t in timings])), 3),
        "apply_arrays_median_ms": round(1e3 * float(np.median([t.arrays for t in timings])), 3),
        "finish_and_add_median_ms": round(1e3 * float(np.median([t.finish for t in timings])), 3),
        "mean_decodes": round(float(np.mean([t.decodes for t in timings])), 1),
        "mean_prefill_tokens": round(float(np.mean([t.prefill_tokens for t in timings])), 1),
        "running": load.scheduler.num_running,
        "waiting": load.scheduler.num_waiting,
        "preempted": counters.swapped + counters.recomputed,
        "finished": counters.finished,
        "steps": args.steps,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
    }


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--running", type=int, default=1024, help="slots, all in use (default %(default)s)")
    parser.add_argument("--waiting", type=int, default=64, help="requests in the queue (default %(default)s)")
    parser.add_argument("--dense-batch-size", type=int, default=2560, help="rows per step (default %(default)s)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page (default %(default)s)")
    parser.add_argument("--max-model-len", type=int, default=131_072, help="tokens (default %(default)s)")
    parser.add_argument("--output", type=int, default=1024, help="mean output tokens (default %(default)s)")
    parser.add_argument("--memory", type=float, default=1.5, help="pages, of the mean demand (default %(default)s)")
    parser.add_argument("--rare", action="store_true", help="every request has logit_bias and min_tokens")
    parser.add_argument("--warmup", type=int, default=3000, help="steps before measuring (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="steps measured (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    for name in ("running", "waiting", "output", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: must be at least 1, not {getattr(args, name)}")
    try:
        result = measure(args)
    except InputError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(result))
        return 0
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name.replace('_', ' '):{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
