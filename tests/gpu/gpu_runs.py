"""GPU executors of small models for tests: made of arrays or directories, with the plans that are worth comparing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
from executor_cases import BatchMaker, random_weights, small_model

from nf.executors import gpu_weights
from nf.executors.gpu import GpuExecutor
from nf.executors.gpu_weights import DeviceWeights, load_device_weights
from nf.graphs.plan import PipelinePlan, nano_batch_plan, sequential_plan
from nf.kernels.device import Device, DeviceMemory
from nf.kernels.registry import all_sources, artifacts
from nf.models.declaration import Model, ModelWeights

PAGE = 16
SLOTS = 6
MAX_LEN = 160
SIZES = {"page_size": PAGE, "num_pages": 96, "num_host_pages": 16, "max_num_seqs": SLOTS, "max_model_len": MAX_LEN}
COMPUTE_SMS, MEMORY_SMS = 100, 32  # of the partitioned plan


def model_for_gpu(**changes) -> Model:
    """A model as small as the kernels allow."""
    sizes = {"vocab_size": 272, "hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "head_dim": 64}
    return small_model(**(sizes | changes))


def weights_for_gpu(model: Model, seed: int) -> ModelWeights:
    """Random weights that bfloat16 holds exactly; of experts, with choices that rounding does not change."""
    weights = random_weights(model, seed)
    if model.config.num_experts:
        route_by_token(model, weights, seed)
    return map_weights(weights, lambda array: array.astype(ml_dtypes.bfloat16).astype(np.float32))


def map_weights(weights: ModelWeights, change) -> ModelWeights:
    embed = change(weights.embed)
    lm_head = embed if weights.lm_head is weights.embed else change(weights.lm_head)
    layers = tuple({name: change(array) for name, array in layer.items()} for layer in weights.layers)
    return ModelWeights(embed, change(weights.final_norm), lm_head, layers)


def route_by_token(model: Model, weights: ModelWeights, seed: int) -> None:
    """Let the first dimensions of a token's embedding say clearly which experts it goes to, in every layer.

    Elsewhere near ties between experts decide: what rounding turns around then changes a token altogether, and says
    nothing about the kernels. No layer writes these dimensions, and each reads them in an order of its own.
    """
    config, rng = model.config, np.random.default_rng(seed)
    experts = config.num_experts
    weights.embed[:, :experts] = 0
    for row in weights.embed:
        chosen = rng.permutation(experts)[: config.experts_per_token]
        row[chosen] = 2 + np.arange(len(chosen)) / 2
    for layer in weights.layers:
        layer["o_proj"][:experts] = 0
        layer["moe_down_proj"][:, :experts] = 0
        layer["ffn_norm"][:experts] = 1
        layer["router"][...] = 0
        layer["router"][np.arange(experts), rng.permutation(experts)] = 2


def upload_weights(model: Model, weights: ModelWeights) -> DeviceWeights:
    """Weights from the host, as they would be loaded from files."""
    places = gpu_weights.layout(model)
    memory = DeviceMemory(places.num_bytes, "weights")

    def put(array: np.ndarray, place: int) -> int:
        memory.upload(array.astype(ml_dtypes.bfloat16), place)
        return memory.pointer + place

    return DeviceWeights(
        put(weights.embed, places.embed),
        put(weights.final_norm, places.final_norm),
        put(weights.lm_head, places.lm_head),
        tuple(
            {name: put(layer[name], place) for name, place in own.items()}
            for own, layer in zip(places.layers, weights.layers, strict=True)
        ),
        memory,
    )


@contextmanager
def gpu_executor(
    model: Model, weights: ModelWeights | Path, plan: PipelinePlan | int | Sequence[PipelinePlan], **sizes: int
) -> Iterator[GpuExecutor]:
    """An executor of a plan or several, closed at the end; a number is the sequential plan of that dense batch size."""
    device = Device()
    plan = sequential_plan(model.operations, plan) if isinstance(plan, int) else plan
    plans = [plan] if isinstance(plan, PipelinePlan) else plan
    on_device = load_device_weights(model, weights) if isinstance(weights, Path) else upload_weights(model, weights)
    compiled = artifacts(all_sources(), device.arch)
    run = GpuExecutor(model, on_device, plans, device=device, artifacts=compiled, **(SIZES | sizes))
    try:
        yield run
    finally:
        run.close()


def partitioned_plan(model: Model, dense_batch_size: int) -> PipelinePlan:
    """Two nano-batches, each stream on SMs of its own."""
    plan = nano_batch_plan(model.operations, dense_batch_size)
    sms = {"compute": COMPUTE_SMS, "memory": MEMORY_SMS}
    streams = tuple(dataclasses.replace(stream, sms=sms[stream.name]) for stream in plan.streams)
    return dataclasses.replace(plan, name="partitioned", streams=streams)


def plans(model: Model, dense_batch_size: int) -> dict[str, PipelinePlan]:
    """The kinds of plans there are."""
    return {
        "sequential": sequential_plan(model.operations, dense_batch_size),
        "nano-batch": nano_batch_plan(model.operations, dense_batch_size),
        "partitioned": partitioned_plan(model, dense_batch_size),
    }


def maker(page_size: int = PAGE, num_pages: int = SIZES["num_pages"], seed: int = 0) -> BatchMaker:
    return BatchMaker(page_size, num_pages, -(-MAX_LEN // page_size), np.random.default_rng(seed))


def relative_errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each row |found − expected| / |expected|, Euclidean; NaN counts as infinite."""
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return np.nan_to_num(errors, nan=np.inf)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest of any row."""
    return float(relative_errors(found, expected).max(initial=0.0))
