"""Declarations: one attention for all, variants only where the models differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nf.config import ModelConfig
from nf.errors import ModelError
from nf.models.hf_config import DEFAULTS
from nf.models.operations import Resource, Rows
from nf.models.registry import DECLARATIONS, declare

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
)
MIXTRAL = replace(CONFIG, architecture="MixtralForCausalLM", num_experts=4, experts_per_token=2)


def test_every_architecture_that_can_be_read_can_be_declared() -> None:
    assert DECLARATIONS.keys() == DEFAULTS.keys()


def test_dense_layer() -> None:
    model = declare(CONFIG)
    names = [operation.name for operation in model.operations]
    attention = ["attn_norm", "qkv_proj", "rope_append", "decode_attention", "prefill_attention", "o_proj"]
    assert names == [*attention, "ffn_norm", "gate_up_proj", "down_proj"]
    by_name = {operation.name: operation for operation in model.operations}
    assert by_name["decode_attention"].rows is Rows.DECODE
    assert by_name["decode_attention"].resource is Resource.MEMORY
    assert by_name["prefill_attention"].rows is Rows.PREFILL
    assert by_name["prefill_attention"].reads_before == ("kv",)
    assert by_name["gate_up_proj"].resource is Resource.COMPUTE
    shapes = {weight.name: weight.shape for weight in model.layer_weights}
    assert shapes == {
        "attn_norm": (32,),
        "qkv_proj": (64, 32),
        "o_proj": (32, 32),
        "ffn_norm": (32,),
        "gate_up_proj": (96, 32),
        "down_proj": (32, 48),
    }


@pytest.mark.parametrize(
    ("config", "added"),
    [
        (replace(CONFIG, architecture="Qwen2ForCausalLM", qkv_bias=True), {"qkv_bias": (64,)}),
        (replace(CONFIG, architecture="Qwen3ForCausalLM", qk_norm=True), {"q_norm": (8,), "k_norm": (8,)}),
        (replace(CONFIG, qkv_bias=True, o_bias=True), {"qkv_bias": (64,), "o_bias": (32,)}),
        (replace(CONFIG, architecture="MistralForCausalLM", sliding_window=16), {}),
    ],
)
def test_dense_variants_differ_by_weights(config: ModelConfig, added: dict[str, tuple[int, ...]]) -> None:
    plain, variant = declare(CONFIG), declare(config)
    bare = [replace(operation, weights=()) for operation in variant.operations]
    assert bare == [replace(operation, weights=()) for operation in plain.operations]
    assert {w.name: w.shape for w in variant.layer_weights if w not in plain.layer_weights} == added


def test_mixtral_replaces_the_feed_forward_part() -> None:
    model = declare(MIXTRAL)
    assert [operation.name for operation in model.operations][6:] == [
        "ffn_norm",
        "router",
        "moe_gate_up_proj",
        "moe_down_proj",
    ]
    assert model.operations[:6] == declare(CONFIG).operations[:6]
    shapes = {weight.name: weight.shape for weight in model.layer_weights}
    assert shapes["router"] == (4, 32)
    assert shapes["moe_gate_up_proj"] == (4, 96, 32)
    assert shapes["moe_down_proj"] == (4, 32, 48)


@pytest.mark.parametrize("config", [CONFIG, MIXTRAL, replace(CONFIG, qkv_bias=True, o_bias=True, qk_norm=True)])
def test_declaration_is_closed(config: ModelConfig) -> None:
    """Operations use exactly the declared weights, and read nothing that no operation writes."""
    model = declare(config)
    used = [name for operation in model.operations for name in operation.weights]
    assert sorted(used) == sorted(weight.name for weight in model.layer_weights)
    written = {name for operation in model.operations for name in operation.writes}
    assert {name for operation in model.operations for name in operation.reads + operation.reads_before} <= written
    for weight in model.layer_weights:
        rows = weight.shape[1] if weight.name.startswith("moe_") else weight.shape[0]
        assert sum(weight.part_rows) == rows
        assert len(weight.parts) == len(weight.part_rows)


def test_tied_lm_head_names_the_embedding() -> None:
    tied, untied = declare(replace(CONFIG, tie_word_embeddings=True)), declare(CONFIG)
    assert tied.lm_head.parts == tied.embed.parts
    assert untied.lm_head.parts == ("lm_head.weight",)


def test_unknown_architecture() -> None:
    with pytest.raises(ModelError, match=r"'MambaForCausalLM' is not supported; LlamaForCausalLM, .* are"):
        declare(replace(CONFIG, architecture="MambaForCausalLM"))
