"""KV pool sizes and the bytes that swapping and recomputing move, against sums written out by hand."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from nf.config import EngineConfig, ModelConfig
from nf.errors import InputError
from nf.memory_budget import free_ram, kv_bytes_per_token, pool_sizes, recompute_bytes_per_token, weight_bytes
from nf.models.registry import declare

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
DECLARED = declare(MODEL)
CONFIG = EngineConfig(max_model_len=60, max_num_seqs=10, page_size=16)


def test_kv_bytes_per_token() -> None:
    assert kv_bytes_per_token(MODEL) == 3 * 2 * 2 * 8 * 4  # layers · (K, V) · heads · head_dim · float32


def give(monkeypatch: pytest.MonkeyPatch, for_pages: int) -> None:
    """Let the machine have so many bytes beside the weights and the tables."""
    tables = 60 * 8 * 4 + 10 * (60 + 4) * 4  # cosines and sines; token ids and page numbers of 10 sequences
    monkeypatch.setattr("nf.memory_budget.free_ram", lambda: weight_bytes(DECLARED) + tables + for_pages)


def test_pool_holds_every_sequence_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.memory_budget.free_ram", lambda: 1 << 40)
    assert pool_sizes(CONFIG, DECLARED) == (40, 0)  # 10 sequences of 4 pages; nothing is ever preempted


def test_pool_is_a_share_of_free_memory_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page_bytes = 16 * kv_bytes_per_token(MODEL)
    give(monkeypatch, 4 * 25 * page_bytes + 3)
    with caplog.at_level(logging.INFO, "nf.memory_budget"):
        assert pool_sizes(CONFIG, DECLARED) == (25, 15)
    assert "25 pages of 16 tokens" in caplog.text
    give(monkeypatch, 4 * 5 * page_bytes)
    assert pool_sizes(CONFIG, DECLARED) == (5, 5)
    give(monkeypatch, page_bytes)
    assert pool_sizes(CONFIG, DECLARED) == (1, 0)


def test_configured_pool_is_taken_as_it_is() -> None:
    assert pool_sizes(replace(CONFIG, num_pages=7), DECLARED) == (7, 7)
    assert pool_sizes(replace(CONFIG, num_pages=7, num_host_pages=0), DECLARED) == (7, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pages": 2**31 - 1}, r"^num_pages: 2147483647 KV pages of 16 tokens and 0 on the host need .* MiB, and"),
        ({"num_host_pages": 2**31 - 1}, "^num_host_pages: 3 KV pages of 16 tokens and 2147483647 on the host need"),
        ({"page_size": 10**9}, r"^page_size: 1 KV pages of 1000000000 tokens and 0 on the host need 366,210 MiB"),
        ({"max_model_len": 10**9}, r"^max_model_len: tables for 1000000000 positions of 10 sequences need .*"),
    ],
)
def test_what_memory_cannot_hold_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, int], message: str
) -> None:
    give(monkeypatch, 12 * 16 * kv_bytes_per_token(MODEL))
    with pytest.raises(InputError, match=message):
        pool_sizes(replace(CONFIG, **change), DECLARED)


def test_recompute_bytes_of_a_dense_model() -> None:
    hidden, inner, heads, kv, qkv = 32, 48, 32, 32, 64
    weights = qkv * hidden + hidden * heads + 2 * inner * hidden + hidden * inner + 2 * hidden
    rows = (
        (hidden + hidden)  # attn_norm
        + (hidden + qkv)  # qkv_proj
        + (qkv + heads + kv)  # rope_append
        + (heads + kv + heads)  # prefill_attention
        + (heads + hidden + hidden)  # o_proj
        + (hidden + hidden)  # ffn_norm
        + (hidden + inner)  # gate_up_proj
        + (inner + hidden + hidden)  # down_proj
    )
    assert recompute_bytes_per_token(declare(MODEL), 8) == pytest.approx(3 * 4 * (weights / 8 + rows))


def test_recompute_bytes_count_all_experts_weights_and_the_used_ones_rows() -> None:
    experts = replace(MODEL, architecture="MixtralForCausalLM", num_experts=4, experts_per_token=2)
    more = recompute_bytes_per_token(declare(experts), 8) - recompute_bytes_per_token(declare(MODEL), 8)
    weights = 3 * (3 * 48 * 32) + 4 * 32  # three more experts and the router
    routing = 4 + 4 + 4 + 32  # written once, read twice; the router reads the normed row once more
    assert more == pytest.approx(3 * 4 * (weights / 8 + 2 * 48 + routing))


def test_weight_bytes_count_a_tied_embedding_once() -> None:
    layer = 64 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32
    assert weight_bytes(declare(MODEL)) == 4 * (3 * layer + 2 * 100 * 32 + 32)
    assert weight_bytes(declare(replace(MODEL, tie_word_embeddings=True))) == 4 * (3 * layer + 100 * 32 + 32)


def test_free_ram_is_plausible() -> None:
    assert 1 << 20 < free_ram() < 1 << 50
