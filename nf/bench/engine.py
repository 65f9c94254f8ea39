"""What the benchmarks of the whole engine share: loading with a clock, greedy requests, and what the process takes."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Unpack, cast

from nf.bench import card
from nf.bench.power import ENGINE_POLL_SECONDS, PowerMeter
from nf.bench.steps import StepLog
from nf.bench.workload import Workload
from nf.config import EngineConfig, ModelConfig
from nf.errors import InputError
from nf.executors.trace import Span, Traceable
from nf.loading import Loaded, Options, load
from nf.sampling_params import SamplingParams
from nf.scheduler.batch import Batch

WARMUP_OUTPUT_LEN = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """A model loaded to be measured.

    Args:
        loaded: its executor is ``log``.
        log: keeps a record of every step.
        startup: seconds of "import", of the parts of loading that are told ("kernels", "weights", "capture", …) and of
            the "other" ones.
    """

    loaded: Loaded
    log: StepLog
    startup: dict[str, float]

    @property
    def config(self) -> EngineConfig:
        return self.loaded.config

    @property
    def model_config(self) -> ModelConfig:
        return self.loaded.model_config

    @property
    def gpus(self) -> int:
        """How many run the model; 0 on the CPU."""
        return self.config.tensor_parallel_size if self.config.device == "cuda" else 0

    def check(self, workload: Workload) -> None:
        """Raise InputError if a request is longer than the engine takes."""
        longest, most = int((workload.input_lens + workload.output_lens).max()), self.config.max_model_len
        assert most is not None
        if longest > most:
            raise InputError(
                "--max-model-len", f"{most} tokens, and the longest request of {workload.name} has {longest} in and out"
            )

    def requests(self, workload: Workload, *, detokenize: bool = False) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompts and parameters: greedy, past any end of text, to the full length."""
        params = {
            output_len: SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=detokenize)
            for output_len in set(workload.output_lens.tolist())
        }
        prompts = workload.prompts(self.model_config.vocab_size)
        return prompts, [params[output_len] for output_len in workload.output_lens.tolist()]

    @property
    def traceable(self) -> bool:
        """Whether the executor can say where a step's time goes."""
        return hasattr(self.log.executor, "trace")

    def trace(self, batch: Batch | None) -> list[Span]:
        """Time a step whose requests have ended, nano-operation by nano-operation; see nf.executors.trace."""
        return [] if batch is None else cast(Traceable, self.log.executor).trace(batch)

    def power_meter(self) -> PowerMeter:
        """Of the GPUs that run the model."""
        return PowerMeter(*range(self.gpus), poll_seconds=ENGINE_POLL_SECONDS)

    def memory(self) -> dict[str, int | None]:
        """Bytes: most that the process has held in RAM, and what is in use on the GPUs now."""
        used = [card.memory_used(gpu) for gpu in range(self.gpus)]
        known = [size for size in used if size is not None]
        return {"host": _peak_rss(), "gpu": sum(known) if known else None}


def subject(model: str | os.PathLike[str], import_seconds: float, **options: Unpack[Options]) -> Subject:
    """Load a model; errors are those of :func:`nf.loading.load`.

    Args:
        import_seconds: what importing took before.
    """
    start = time.perf_counter()
    loaded = load(model, **options)
    seconds = time.perf_counter() - start
    told: dict[str, float] = getattr(loaded, "startup", None) or getattr(loaded.executor, "startup", {})
    parts = {"import": import_seconds, **told, "other": max(0.0, seconds - sum(told.values()))}
    log = StepLog(loaded.executor)
    return Subject(replace(loaded, executor=log), log, parts)


def describe(subject: Subject, workload: Workload, model: str) -> dict[str, Any]:
    """What was run, for the record."""
    return {
        "model": model,
        "architecture": subject.model_config.architecture,
        "options": asdict(subject.config),
        "workload": workload.describe(),
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
