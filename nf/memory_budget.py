"""Sizes that follow from memory: how many KV pages there are, and what swapping and recomputing move."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from nf.config import EngineConfig, ModelConfig
from nf.errors import InputError
from nf.models.buffers import row_widths
from nf.models.declaration import Model
from nf.models.operations import Rows

logger = logging.getLogger(__name__)

RAM_SHARE = 0.25
"""Most of the RAM left beside the weights that the device pages take by default on the CPU; host pages may take as
much again."""

CPU_VALUE_BYTES = 4  # the CPU executor computes and caches in float32
_FALLBACK_RAM = 4 << 30  # where the operating system does not say


def kv_bytes_per_token(model: ModelConfig) -> int:
    """Keys and values of one token in all layers, bytes."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * CPU_VALUE_BYTES


def pool_sizes(config: EngineConfig, model: Model) -> tuple[int, int]:
    """Device pages and host pages, as configured or else by memory.

    Device pages: what ``max_num_seqs`` sequences of ``max_model_len`` tokens need, but at most RAM_SHARE of the RAM
    that weights and tables leave. Host pages: what is missing to that need, but no more than the device pages. Either
    is taken from the operating system only when it is first written.

    Raises:
        InputError: tables for ``max_model_len`` positions, or the pages, need more RAM than there is.
    """
    free = _free_for_pages(config, model)
    assert config.max_num_seqs is not None
    assert config.max_model_len is not None
    needed = config.max_num_seqs * -(-config.max_model_len // config.page_size)
    page_bytes = config.page_size * kv_bytes_per_token(model.config)
    num_pages, num_host_pages = config.num_pages, config.num_host_pages
    if num_pages is None:
        affordable = max(1, int(free * RAM_SHARE) // page_bytes)
        num_pages = min(needed, affordable)
        logger.info(
            "KV cache: %d pages of %d tokens, up to %s; %d sequences of %d tokens would need %d, and %d %% of the %s "
            "that weights leave hold %d",
            num_pages,
            config.page_size,
            mebibytes(num_pages * page_bytes),
            config.max_num_seqs,
            config.max_model_len,
            needed,
            round(RAM_SHARE * 100),
            mebibytes(free),
            affordable,
        )
    if num_host_pages is None:
        num_host_pages = min(num_pages, max(0, needed - num_pages), max(0, free // page_bytes - num_pages))
    if (num_pages + num_host_pages) * page_bytes > free:
        raise InputError(
            _whose_fault(config),
            f"{num_pages} KV pages of {config.page_size} tokens and {num_host_pages} on the host need "
            f"{mebibytes((num_pages + num_host_pages) * page_bytes)}, and {mebibytes(free)} are free",
        )
    return num_pages, num_host_pages


def _whose_fault(config: EngineConfig) -> str:
    """The option that asks for more pages than there is memory for."""
    if config.num_pages is not None:
        return "num_pages"
    return "num_host_pages" if config.num_host_pages else "page_size"


def _free_for_pages(config: EngineConfig, model: Model) -> int:
    """Bytes of RAM that weights and tables leave."""
    assert config.max_model_len is not None
    free = max(0, free_ram() - weight_bytes(model))
    tables = _table_bytes(config, model.config, config.max_model_len)
    if tables > free:
        raise InputError(
            "max_model_len",
            f"tables for {config.max_model_len} positions of {config.max_num_seqs} sequences need {mebibytes(tables)}, "
            f"and {mebibytes(free)} are free; lower it or max_num_seqs",
        )
    return free - tables


def _table_bytes(config: EngineConfig, model: ModelConfig, max_model_len: int) -> int:
    """What grows with the model's length whatever runs: cosines and sines, token buffer and page table."""
    rotary = max_model_len * model.head_dim * CPU_VALUE_BYTES
    assert config.max_num_seqs is not None
    per_seq = max_model_len + -(-max_model_len // config.page_size)
    return rotary + config.max_num_seqs * per_seq * 4  # token ids and page numbers are int32


def mebibytes(num_bytes: int) -> str:
    """As errors show it; an absurd model's number of bytes may exceed what a float holds."""
    return f"{num_bytes >> 20:,} MiB" if num_bytes >> 30 else f"{num_bytes / 2**20:.1f} MiB"


def weight_bytes(model: Model) -> int:
    """Bytes of all weights as the CPU executor holds them, a tied embedding counted once."""
    ends = {(weight.parts, weight.shape) for weight in (model.embed, model.final_norm, model.lm_head)}
    values = sum(math.prod(shape) for _, shape in ends)
    return CPU_VALUE_BYTES * values + model.config.num_layers * _layer_weight_bytes(model)


def recompute_bytes_per_token(model: Model, dense_batch_size: int) -> float:
    """Bytes moved to compute the KV of one token again.

    The weights of all layers are read once per step and shared by the ``dense_batch_size`` tokens in it; besides,
    every operation reads and writes its buffers' row of the token::

        Σ_layers (weight bytes / dense_batch_size + Σ_operations Σ_(reads, writes) row bytes)

    Decode attention is left out: recomputed tokens are prefill. The KV of earlier tokens, which prefill attention also
    reads, is left out too; it is shared by a chunk's tokens and small beside the rest.
    """
    widths = row_widths(model.config)
    rows = sum(
        widths[buffer]
        for operation in model.operations
        if operation.rows is not Rows.DECODE
        for buffer in (*operation.reads, *operation.writes)
    )
    return model.config.num_layers * (_layer_weight_bytes(model) / dense_batch_size + rows * CPU_VALUE_BYTES)


def _layer_weight_bytes(model: Model) -> int:
    return CPU_VALUE_BYTES * sum(math.prod(weight.shape) for weight in model.layer_weights)


def free_ram() -> int:
    """Bytes this process may still take: free RAM, or what its control group has left if that is less."""
    return min([_free_physical(), *_free_in_cgroup()])


def _free_physical() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return _FALLBACK_RAM


def _free_in_cgroup() -> list[int]:
    """A list of one number, or none if no limit is set (control groups v2)."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text(), (root / "memory.current").read_text()
        return [max(0, int(limit) - int(used))]  # an unlimited group says "max", which is no number
    except (OSError, ValueError):
        return []
