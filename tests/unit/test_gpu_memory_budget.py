"""How a GPU's memory is shared out, against sums written out by hand."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from nf.config import EngineConfig
from nf.errors import InputError
from nf.gpu_memory_budget import (
    GpuMemory,
    gpu_pool_sizes,
    kv_bytes_per_token,
    recompute_seconds_per_token,
    swap_seconds_per_page,
)
from nf.models.registry import declare
from nf.models.shapes import shape

GIB = 1 << 30
MODEL = shape("llama-3-8b")
TOKEN = 2 * 32 * 8 * 128 * 2  # (K, V) · layers · heads · head_dim · bfloat16
PAGE = 16 * TOKEN
CONFIG = EngineConfig(max_model_len=8192, max_num_seqs=1024, gpu_memory_utilization=0.9)
MEMORY = GpuMemory(total=140 * GIB, free=138 * GIB, weights=15 * GIB, workspace=3 * GIB)


@pytest.fixture(autouse=True)
def ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.gpu_memory_budget.free_ram", lambda: 100 * GIB)


def test_kv_bytes_per_token() -> None:
    assert kv_bytes_per_token(MODEL) == TOKEN == 131_072


def test_pages_take_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nf.gpu_memory_budget"):
        num_pages, num_host_pages = gpu_pool_sizes(CONFIG, MODEL, MEMORY)
    assert num_pages == (126 - 2 - 15 - 3) * GIB // PAGE  # 0.9 · 140 = 126; others use 2
    assert num_host_pages == 4 * GIB // PAGE
    assert f"{num_pages} pages of 16 tokens" in caplog.text


def test_no_more_pages_than_sequences_need() -> None:
    assert gpu_pool_sizes(replace(CONFIG, max_num_seqs=3, max_model_len=100), MODEL, MEMORY) == (3 * 7, 0)


def test_host_pages_take_a_quarter_of_the_ram_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.gpu_memory_budget.free_ram", lambda: 8 * GIB)
    assert gpu_pool_sizes(CONFIG, MODEL, MEMORY)[1] == 2 * GIB // PAGE


def test_host_pages_are_no_more_than_what_is_missing() -> None:
    config = replace(CONFIG, num_pages=1024 * 512 - 5)
    assert gpu_pool_sizes(config, MODEL, replace_free(2000 * GIB)) == (config.num_pages, 5)


def test_pages_as_configured() -> None:
    config = replace(CONFIG, num_pages=7, num_host_pages=9)
    assert gpu_pool_sizes(config, MODEL, MEMORY) == (7, 9)
    assert gpu_pool_sizes(replace(config, gpu_memory_utilization=0.01), MODEL, MEMORY) == (7, 9)


def replace_free(total: int) -> GpuMemory:
    return GpuMemory(total, total, MEMORY.weights, MEMORY.workspace)


@pytest.mark.parametrize(
    ("change", "memory", "message"),
    [
        (
            {"gpu_memory_utilization": 0.1},
            MEMORY,
            "^gpu_memory_utilization: 0.1 of 143,360 MiB is not enough for 2,048 MiB already in use, 15,360 MiB of "
            "weights, 3,072 MiB of workspace and a KV page of 2.0 MiB, and 141,312 MiB are free; raise it$",
        ),
        (
            {},
            GpuMemory(24 * GIB, 17 * GIB, 15 * GIB, 3 * GIB),
            "^gpu_memory_utilization: 0.9 of 24,576 MiB is not .* and 17,408 MiB are free; a smaller model, max_num",
        ),
        (
            {"num_pages": 100_000},
            MEMORY,
            "^num_pages: 100000 KV pages of 16 tokens need 200,000 MiB of GPU memory, ",
        ),
        ({"num_host_pages": 60_000}, MEMORY, "^num_host_pages: 60000 KV pages of 16 tokens need 120,000 MiB of RAM, "),
    ],
)
def test_what_memory_cannot_hold_is_refused_with_both_numbers(
    change: dict[str, float], memory: GpuMemory, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        gpu_pool_sizes(replace(CONFIG, **change), MODEL, memory)  # type: ignore[arg-type]


def test_preemption_costs_are_in_one_unit() -> None:
    """An 8B model: 4.2 MB out and in at 55 GB/s; 2 FLOP for each of its 7 billion weights in layers at 660 TFLOP/s."""
    assert swap_seconds_per_page(MODEL, 16) == pytest.approx(2 * PAGE / 55e9)
    layer = 4096 * (6144 + 4096 + 3 * 14336) + 2 * 4096
    assert recompute_seconds_per_token(declare(MODEL)) == pytest.approx(2 * 32 * layer / 660e12)


def test_recomputing_counts_the_experts_a_token_meets() -> None:
    mixtral = declare(shape("mixtral-8x7b"))
    layer = 4096 * (6144 + 4096 + 2 * 3 * 14336 + 8) + 2 * 4096
    assert recompute_seconds_per_token(mixtral) == pytest.approx(2 * 32 * layer / 660e12)
