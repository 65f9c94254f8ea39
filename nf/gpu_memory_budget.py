"""How a GPU's memory is shared out: how many KV pages there are, and what swapping and recomputing cost."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from nf.config import EngineConfig, ModelConfig
from nf.errors import InputError
from nf.executors import gpu_pages
from nf.memory_budget import free_ram, mebibytes
from nf.models.declaration import Model
from nf.weights import is_stacked

logger = logging.getLogger(__name__)

MAX_HOST_BYTES = 4 << 30
HOST_RAM_SHARE = 0.25
"""Host pages take at most so much of the free RAM by default; they are page-locked, so the system cannot swap them."""

# Preemption compares a swap with a recomputation; only the ratio of these two matters. Measured on an H200.
SWAP_BYTES_PER_SECOND = 55e9  # pinned host memory ↔ device
FLOPS_PER_SECOND = 660e12  # bf16 GEMMs at steady state


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of a GPU before anything of the model is there, and what the model will take beside its KV pages.

    Args:
        total: of the GPU.
        free: not yet in use, by this process or by others.
        weights: of the model.
        workspace: activations, inputs, graphs and loaded kernels.
    """

    total: int
    free: int
    weights: int
    workspace: int

    def left(self, utilization: float) -> int:
        """For KV pages, if the whole GPU is used up to this share; below 0 if even weights do not fit."""
        return math.floor(utilization * self.total) - (self.total - self.free) - self.weights - self.workspace


def kv_bytes_per_token(model: ModelConfig) -> int:
    """Keys and values of one token in all layers, bytes."""
    return model.num_layers * gpu_pages.page_bytes(model, 1)


def gpu_pool_sizes(config: EngineConfig, model: ModelConfig, memory: GpuMemory) -> tuple[int, int]:
    """Device pages and host pages, as configured or else by memory.

    Device pages: what ``gpu_memory_utilization`` of the GPU leaves beside other processes, weights and workspace, but
    no more than ``max_num_seqs`` sequences of ``max_model_len`` tokens need. Host pages: what is missing to that need,
    but at most MAX_HOST_BYTES and HOST_RAM_SHARE of the free RAM.

    Raises:
        InputError: nothing is left for pages, or those asked for do not fit.
    """
    assert config.max_num_seqs is not None
    assert config.max_model_len is not None
    page_bytes = config.page_size * kv_bytes_per_token(model)
    needed = config.max_num_seqs * -(-config.max_model_len // config.page_size)
    num_pages = config.num_pages
    if num_pages is None:
        left = memory.left(config.gpu_memory_utilization)
        if left < page_bytes:
            raise _nothing_left(config, memory, page_bytes)
        num_pages = min(needed, left // page_bytes)
        logger.info(
            "KV cache: %d pages of %d tokens, %s; %d sequences of %d tokens would need %d, and the GPU's memory holds "
            "%d beside weights of %s and a workspace of %s",
            num_pages,
            config.page_size,
            mebibytes(num_pages * page_bytes),
            config.max_num_seqs,
            config.max_model_len,
            needed,
            left // page_bytes,
            mebibytes(memory.weights),
            mebibytes(memory.workspace),
        )
    elif num_pages * page_bytes > memory.left(1.0):
        raise InputError(
            "num_pages",
            f"{num_pages} KV pages of {config.page_size} tokens need {mebibytes(num_pages * page_bytes)} of GPU "
            f"memory, and {mebibytes(max(0, memory.left(1.0)))} are free beside weights and workspace",
        )
    return num_pages, _host_pages(config, page_bytes, max(0, needed - num_pages))


def _host_pages(config: EngineConfig, page_bytes: int, missing: int) -> int:
    ram = free_ram()
    if config.num_host_pages is None:
        return min(missing, MAX_HOST_BYTES // page_bytes, int(HOST_RAM_SHARE * ram) // page_bytes)
    if config.num_host_pages * page_bytes > ram:
        raise InputError(
            "num_host_pages",
            f"{config.num_host_pages} KV pages of {config.page_size} tokens need "
            f"{mebibytes(config.num_host_pages * page_bytes)} of RAM, and {mebibytes(ram)} are free",
        )
    return config.num_host_pages


def _nothing_left(config: EngineConfig, memory: GpuMemory, page_bytes: int) -> InputError:
    share, used = config.gpu_memory_utilization, memory.total - memory.free
    fits = memory.left(1.0) >= page_bytes
    advice = "raise it" if fits else "a smaller model, max_num_seqs or max_model_len needs less"
    return InputError(
        "gpu_memory_utilization",
        f"{share:g} of {mebibytes(memory.total)} is not enough for {mebibytes(used)} already in use, "
        f"{mebibytes(memory.weights)} of weights, {mebibytes(memory.workspace)} of workspace and a KV page of "
        f"{mebibytes(page_bytes)}, and {mebibytes(memory.free)} are free; {advice}",
    )


def swap_seconds_per_page(model: ModelConfig, page_size: int) -> float:
    """To move a page of all layers out and in again."""
    return 2 * page_size * kv_bytes_per_token(model) / SWAP_BYTES_PER_SECOND


def recompute_seconds_per_token(model: Model) -> float:
    """To compute the KV of one token again, beside the other tokens of full steps: 2 FLOP per weight that it meets.

    A token meets ``experts_per_token`` of the experts. Prefill attention is left out: it grows with the token's
    position, and is a third of the GEMMs of an 8B model at position 10,000.
    """
    config = model.config
    share = {True: config.experts_per_token / max(1, config.num_experts), False: 1.0}
    met = sum(math.prod(weight.shape) * share[is_stacked(weight)] for weight in model.layer_weights)
    return 2 * config.num_layers * met / FLOPS_PER_SECOND
