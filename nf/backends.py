"""What CPU and GPU differ in when a model is loaded: defaults, sizes that follow from memory, weights, the executor."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from nf.config import EngineConfig
from nf.errors import InputError, ModelError
from nf.executors.base import Executor
from nf.executors.cpu import CpuExecutor
from nf.graphs.plan import PipelinePlan, validate
from nf.memory_budget import (
    free_ram,
    kv_bytes_per_token,
    mebibytes,
    pool_sizes,
    recompute_bytes_per_token,
    weight_bytes,
)
from nf.models.declaration import Model
from nf.weights import load_weights, random_weights

if TYPE_CHECKING:
    from nf.kernels.registry import KernelOrigin

logger = logging.getLogger(__name__)

Startup = dict[str, float]  # seconds of each part of loading


class Backend(Protocol):
    """A device that runs models."""

    max_num_seqs: int  # by default

    def resolve(self, config: EngineConfig, model: Model, plans: Sequence[PipelinePlan], name: str) -> EngineConfig:
        """The configuration with this device, and dtype and numbers of pages decided; the other fields already are.

        Args:
            plans: as ``start`` takes them.
            name: what errors call the model.

        Raises:
            InputError: an option does not suit the device, or memory does not suffice.
        """
        ...

    def stored_plans(self, model: Model, dense_batch_size: int) -> list[PipelinePlan]:
        """The plans measured to be the fastest on this device for steps of up to so many tokens; none if nothing was
        measured."""
        ...

    def preemption_costs(self, config: EngineConfig, model: Model) -> tuple[float, float]:
        """Of swapping a page out and in again, and of computing a token's KV again; in one unit."""
        ...

    def start(
        self,
        config: EngineConfig,
        model: Model,
        plans: Sequence[PipelinePlan],
        model_dir: Path | None,
        startup: Startup,
    ) -> Executor:
        """Read the weights from ``model_dir`` or, if it is None, draw them, and make the executor.

        Args:
            plans: each for some steps; the first one's dense batch size is that of the engine.

        Raises:
            CompileError: the GPU's kernels cannot be had.
            ModelError: the weights cannot be used.
            DeviceMemoryError: the GPU has not enough memory free.
        """
        ...


class CpuBackend:
    max_num_seqs = 256

    def resolve(self, config: EngineConfig, model: Model, _plans: Sequence[PipelinePlan], name: str) -> EngineConfig:
        needed, free = weight_bytes(model), free_ram()
        if needed > free:
            raise ModelError(name, f"its weights need {mebibytes(needed)} in float32, and {mebibytes(free)} are free")
        config = replace(config, device="cpu", dtype="float32" if config.dtype == "auto" else config.dtype)
        num_pages, num_host_pages = pool_sizes(config, model)
        return replace(config, num_pages=num_pages, num_host_pages=num_host_pages)

    def stored_plans(self, _model: Model, _dense_batch_size: int) -> list[PipelinePlan]:
        return []

    def preemption_costs(self, config: EngineConfig, model: Model) -> tuple[float, float]:
        """Bytes moved."""
        swap = 2.0 * config.page_size * kv_bytes_per_token(model.config)
        return swap, recompute_bytes_per_token(model, config.max_num_batched_tokens)

    def start(
        self,
        config: EngineConfig,
        model: Model,
        plans: Sequence[PipelinePlan],
        model_dir: Path | None,
        startup: Startup,
    ) -> Executor:
        dtype = np.dtype(_DTYPES[config.dtype])
        with timed(startup, "weights"):
            if model_dir is None:
                weights = random_weights(model, config.seed, dtype)
            else:
                weights = load_weights(model, model_dir, dtype)
        with timed(startup, "executor"):
            return CpuExecutor(model, weights, plans[0], **sizes(config))


_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class GpuBackend:
    """The first GPU.

    Args:
        kernels: where those for it come from.

    Raises:
        CudaError: there is none.
    """

    max_num_seqs = 2048

    def __init__(self, kernels: KernelOrigin) -> None:
        from nf.kernels.device import Device

        self._device = Device()
        self._kernels = kernels

    def resolve(self, config: EngineConfig, model: Model, plans: Sequence[PipelinePlan], _name: str) -> EngineConfig:
        from nf.executors.gpu_memory import workspace_bytes
        from nf.executors.gpu_weights import layout
        from nf.gpu_memory_budget import GpuMemory, gpu_pool_sizes
        from nf.graphs.partition import available_partitions
        from nf.kernels.kv_cache import PAGE_SIZES

        if config.dtype not in ("auto", "bfloat16"):
            raise InputError("dtype", f"must be auto or bfloat16 on a GPU, not {config.dtype}; device='cpu' takes it")
        if config.page_size not in PAGE_SIZES:
            raise InputError(
                "page_size",
                f"must be one of {', '.join(map(str, PAGE_SIZES))} on a GPU, not {config.page_size}; "
                "device='cpu' takes any",
            )
        for plan in plans:
            validate(plan, model.operations, gpu_sms=self._device.sms)
            available_partitions(stream.sms for stream in plan.streams)  # refuses what this GPU cannot give
        config = replace(config, device="cuda", dtype="bfloat16")
        assert config.max_num_seqs is not None
        assert config.max_model_len is not None
        workspace = workspace_bytes(
            model,
            plans,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            page_size=config.page_size,
            sms=self._device.sms,
        )
        free, total = self._device.memory()
        memory = GpuMemory(total, free, layout(model).num_bytes, workspace)
        num_pages, num_host_pages = gpu_pool_sizes(config, model.config, memory)
        return replace(config, num_pages=num_pages, num_host_pages=num_host_pages)

    def stored_plans(self, model: Model, dense_batch_size: int) -> list[PipelinePlan]:
        from nf.graphs.partition import PartitionError, required_partitions
        from nf.graphs.plan_store import find_plans

        found = []
        for stored in find_plans(model, self._device.name, dense_batch_size, gpu_sms=self._device.sms):
            try:
                required_partitions(stream.sms for stream in stored.plan.streams)  # it was measured with them
            except (InputError, PartitionError) as error:  # it was not the user who chose it
                logger.warning("%s is passed over: %s", stored.path, error)
                continue
            logger.info("plan: %s, from %s", stored.plan.name, stored.path)
            found.append(stored.plan)
        return found

    def preemption_costs(self, config: EngineConfig, model: Model) -> tuple[float, float]:
        """Seconds: swapping is bound by the link to the host, recomputing by the tensor cores."""
        from nf.gpu_memory_budget import recompute_seconds_per_token, swap_seconds_per_page

        return swap_seconds_per_page(model.config, config.page_size), recompute_seconds_per_token(model)

    def start(
        self,
        config: EngineConfig,
        model: Model,
        plans: Sequence[PipelinePlan],
        model_dir: Path | None,
        startup: Startup,
    ) -> Executor:
        from nf.executors.gpu import GpuExecutor
        from nf.executors.gpu_weights import load_device_weights, random_device_weights

        with timed(startup, "kernels"):  # before gigabytes are read: some may have to be compiled, and may not compile
            compiled = self._kernels.artifacts()
        with timed(startup, "weights"):
            if model_dir is None:
                weights = random_device_weights(model, config.seed)
            else:
                weights = load_device_weights(model, model_dir)
        executor = GpuExecutor(model, weights, plans, device=self._device, artifacts=compiled, **sizes(config))
        startup |= executor.startup
        return executor


def sizes(config: EngineConfig) -> dict[str, Any]:
    """What scheduler and executor must agree on."""
    return {
        "page_size": config.page_size,
        "num_pages": config.num_pages,
        "num_host_pages": config.num_host_pages,
        "max_num_seqs": config.max_num_seqs,
        "max_model_len": config.max_model_len,
    }


@contextmanager
def timed(startup: Startup, part: str) -> Iterator[None]:
    """Note how long a part of loading takes."""
    start = time.perf_counter()
    yield
    startup[part] = time.perf_counter() - start
