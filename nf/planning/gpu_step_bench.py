"""Whole steps under one plan after the other, by the executor that the engine uses, on random weights and keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load, measure_step
from nf.errors import InputError
from nf.executors.gpu import GpuExecutor
from nf.executors.gpu_memory import workspace_bytes
from nf.executors.gpu_pages import page_bytes
from nf.executors.gpu_weights import random_device_weights
from nf.executors.trace import Span
from nf.graphs.partition import required_partitions
from nf.graphs.pipeline_plan import PipelinePlan
from nf.kernels.compile import Artifact
from nf.kernels.device import Device
from nf.kernels.registry import all_sources, artifacts
from nf.models.declaration import Model
from nf.planning.loads import made_for

PAGE_SIZE = 16
WARM_SECONDS, RUN_SECONDS = 1.0, 2.0
QUICK_WARM_SECONDS, QUICK_RUN_SECONDS = 0.5, 0.7  # clocks have settled, and the energy counter has moved, by then
SPARE_BYTES = 2 << 30


class GpuStepBench:
    """A ``StepBench`` on one GPU.

    Args:
        quick: warm up and measure each load for a shorter time.
        page_size: of the KV cache, tokens.
    """

    def __init__(self, model: Model, device: Device, *, quick: bool = False, page_size: int = PAGE_SIZE) -> None:
        self._model, self._device, self._page_size = model, device, page_size
        self._warm = QUICK_WARM_SECONDS if quick else WARM_SECONDS
        self._run = QUICK_RUN_SECONDS if quick else RUN_SECONDS

    @cached_property
    def _artifacts(self) -> Sequence[Artifact]:
        """Every kernel, compiled for the first step: what is wrong with a user's files is told before."""
        return artifacts(all_sources(), self._device.arch)

    def measure(self, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        """Of each load, with the graphs of ``plan`` captured once."""
        with self._executor(plan, loads) as executor:
            batches = [load.batch(self._page_size, executor.num_pages) for load in loads]
            return [measure_step(executor, batch, warm=self._warm, run=self._run) for batch in batches]

    def trace(self, plan: PipelinePlan, load: Load) -> list[Span]:
        """When each nano-operation of a step ran."""
        with self._executor(plan, [load]) as executor:
            return executor.trace(load.batch(self._page_size, executor.num_pages))

    @contextmanager
    def _executor(self, plan: PipelinePlan, loads: Sequence[Load]) -> Iterator[GpuExecutor]:
        """With as many pages as the loads fill, or as there is room for. ``plan`` runs all loads."""
        plans = plans_for(plan, loads)
        required_partitions(stream.sms for stream in plan.streams)
        batches = [load.batch(self._page_size) for load in loads]
        longest = max(load.input_len + load.output_len for load in loads) + 1
        sizes = {
            "max_num_seqs": max(batch.num_seqs for batch in batches),
            "max_model_len": longest,
            "page_size": self._page_size,
        }
        weights = random_device_weights(self._model, 0)
        try:
            needed = workspace_bytes(self._model, plans, **sizes, sms=self._device.sms)
            free = self._device.memory()[0] - needed - SPARE_BYTES
            config = self._model.config
            num_pages = min(
                max(len(batch.kv_indices) for batch in batches),
                free // (page_bytes(config, self._page_size) * config.num_layers),
            )
            if num_pages < 1:
                raise InputError(
                    "model", f"its weights and a step's buffers leave no room for KV on {self._device.name}"
                )
            executor = GpuExecutor(
                self._model,
                weights,
                plans,
                device=self._device,
                artifacts=self._artifacts,
                num_pages=num_pages,
                num_host_pages=0,
                **sizes,
            )
        except BaseException:
            weights.free()
            raise
        try:
            executor.randomize_kv(seed=1)
            yield executor
        finally:
            executor.close()


def plans_for(plan: PipelinePlan, loads: Sequence[Load]) -> list[PipelinePlan]:
    """``plan`` for any step, and where a load only decodes also as an engine runs it then: without what only prefill
    chunks need."""
    found = [replace(plan, loads=())]
    if decoding := tuple(made_for(load) for load in loads if load.decode_only):
        found.append(replace(plan, loads=decoding))
    return found
