"""``nf bench throughput``: all requests at once, and how many tokens per second come of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nf.bench.engine import WARMUP_OUTPUT_LEN, Subject
from nf.bench.metrics import summaries, times
from nf.bench.roofline import VALUE_BYTES, Ceilings, active_parameters, eq5, power_roofline, work
from nf.bench.step_table import step_table
from nf.bench.steps import StepRecord, steady
from nf.bench.workload import Workload
from nf.executors.trace import Span
from nf.llm import LLM
from nf.models.registry import declare
from nf.outputs import RequestOutput
from nf.scheduler.batch import Batch


@dataclass(frozen=True, slots=True)
class Run:
    """A timed run.

    Args:
        start, end: before the first request was given and after the last one was finished; monotonic clock, seconds.
        watts, megahertz: of the GPUs and of their SMs in between, on average; NaN if unknown.
        outputs: of every request.
        steps: the engine's.
        batch: a step of the steady part.
        memory: bytes on "host" and "gpu" at the end.
        first_token: seconds from the call of ``run`` to the warm-up's first token.
    """

    start: float
    end: float
    watts: float
    megahertz: float
    outputs: list[RequestOutput]
    steps: list[StepRecord]
    batch: Batch | None
    memory: dict[str, int | None]
    first_token: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def run(
    llm: LLM,
    subject: Subject,
    workload: Workload,
    *,
    warmups: int = 8,
    detokenize: bool = False,
    show: bool = False,
) -> Run:
    """Warm up with a few short requests, then give the engine all requests at once and wait for them.

    Args:
        llm: made of ``subject.loaded``.
        warmups: requests before the timed run.
        detokenize: make texts of the outputs as well.
        show: draw a progress bar on stderr if it is a terminal.
    """
    called = time.monotonic()
    prompts, params = subject.requests(workload.warmup(max(1, warmups), WARMUP_OUTPUT_LEN), detokenize=detokenize)
    warm = llm.generate(prompts, params, use_tqdm=False)
    first_token = min(times(output, called).ttft for output in warm)

    prompts, params = subject.requests(workload, detokenize=detokenize)
    subject.log.start(keep_after=(workload.input_tokens + workload.output_tokens) // 2)
    with subject.power_meter() as meter:
        start = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=show)
        end = time.monotonic()
    steps, batch = list(subject.log.records), subject.log.kept
    return Run(start, end, meter.watts, meter.megahertz, outputs, steps, batch, subject.memory(), first_token)


def results(
    run: Run, subject: Subject, workload: Workload, ceilings: Ceilings | None, spans: Sequence[Span] = ()
) -> dict[str, Any]:
    """Everything worth knowing of a run, for the record; rates are tokens per second, times seconds, sizes bytes.

    Args:
        spans: of the run's ``batch``, traced; none if it was not.
    """
    all_times = [times(output) for output in run.outputs]
    in_, out = workload.input_tokens, sum(one.output_tokens for one in all_times)
    model = declare(subject.model_config)
    middle = steady(run.start, run.steps)
    total = (in_ + out) / run.seconds
    startup = subject.startup
    ready = sum(startup.values())
    return {
        "seconds": run.seconds,
        "requests_per_second": len(workload) / run.seconds,
        "tokens_per_second": {"input": in_ / run.seconds, "output": out / run.seconds, "total": total},
        "steady": None if middle is None else asdict(middle),
        "joules_per_token": run.watts * run.seconds / (in_ + out),
        "watts": run.watts,
        "sm_megahertz": run.megahertz,
        "active_parameters": active_parameters(model),
        "ceilings": None if ceilings is None else _against(ceilings, subject, workload, total),
        **summaries(all_times),
        "steps": {"count": len(run.steps), "mean_tokens": sum(s.rows for s in run.steps) / max(1, len(run.steps))},
        "step": _step(spans, run.batch, subject, ceilings),
        "preemptions": sum(output.metrics.preemptions for output in run.outputs),
        "memory": run.memory,
        "startup": startup | {"total": ready, "first_token": ready + run.first_token},
    }


def _step(
    spans: Sequence[Span], batch: Batch | None, subject: Subject, ceilings: Ceilings | None
) -> dict[str, Any] | None:
    """Where a traced step's time goes."""
    if batch is None or not spans:
        return None
    value_bytes = VALUE_BYTES.get(subject.config.dtype, 2)
    return step_table(spans, batch, declare(subject.model_config), ceilings, value_bytes).record()


def _against(ceilings: Ceilings, subject: Subject, workload: Workload, rate: float) -> dict[str, float]:
    """Ceilings, the rates they allow and the shares reached."""
    model = declare(subject.model_config)
    by_operations = eq5(ceilings.flops, model)
    by_power = power_roofline(ceilings, work(model, workload, VALUE_BYTES.get(subject.config.dtype, 2)))
    return asdict(ceilings) | {
        "eq5": by_operations,
        "share_of_eq5": rate / by_operations,
        "power_roofline": by_power,
        "share_of_power_roofline": rate / by_power if by_power else math.nan,
    }
