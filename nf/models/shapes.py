"""Shapes of well-known models, by name, for benchmarks and planning where no checkpoint is at hand.

The values are those of config.json and generation_config.json on the Hugging Face hub.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from nf.config import ModelConfig, RopeConfig
from nf.errors import InputError, shown

_LLAMA_3_8B = ModelConfig(  # meta-llama/Meta-Llama-3-8B
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    rope=RopeConfig(500_000.0),
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)

_MISTRAL_7B = ModelConfig(  # mistralai/Mistral-7B-v0.3, the one without a sliding window
    architecture="MistralForCausalLM",
    vocab_size=32_768,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=32_768,
    rope=RopeConfig(1_000_000.0),
    bos_token_id=1,
    eos_token_ids=(2,),
)

_QWEN2_7B = ModelConfig(  # Qwen/Qwen2-7B
    architecture="Qwen2ForCausalLM",
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    max_position_embeddings=131_072,
    rope=RopeConfig(1_000_000.0),
    qkv_bias=True,
    bos_token_id=151_643,
    eos_token_ids=(151_643,),
)

SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3-8b": _LLAMA_3_8B,
        "llama-3-70b": replace(  # meta-llama/Meta-Llama-3-70B
            _LLAMA_3_8B, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
        ),
        "llama-2-70b": replace(  # meta-llama/Llama-2-70b-hf
            _LLAMA_3_8B,
            vocab_size=32_000,
            hidden_size=8192,
            intermediate_size=28_672,
            num_layers=80,
            num_heads=64,
            max_position_embeddings=4096,
            rope=RopeConfig(10_000.0),
            dtype="float16",
            bos_token_id=1,
            eos_token_ids=(2,),
        ),
        "llama-3.1-405b": replace(  # meta-llama/Llama-3.1-405B
            _LLAMA_3_8B,
            hidden_size=16_384,
            intermediate_size=53_248,
            num_layers=126,
            num_heads=128,
            max_position_embeddings=131_072,
            rope=RopeConfig(500_000.0, "llama3", 8.0),
        ),
        "mistral-7b": _MISTRAL_7B,
        "mixtral-8x7b": replace(  # mistralai/Mixtral-8x7B-v0.1
            _MISTRAL_7B, architecture="MixtralForCausalLM", vocab_size=32_000, num_experts=8, experts_per_token=2
        ),
        "qwen2-7b": _QWEN2_7B,
        "qwen2-72b": replace(  # Qwen/Qwen2-72B
            _QWEN2_7B,
            hidden_size=8192,
            intermediate_size=29_568,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            rms_norm_eps=1e-5,
        ),
        "qwen3-8b": ModelConfig(  # Qwen/Qwen3-8B
            architecture="Qwen3ForCausalLM",
            vocab_size=151_936,
            hidden_size=4096,
            intermediate_size=12_288,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            max_position_embeddings=40_960,
            rope=RopeConfig(1_000_000.0),
            qk_norm=True,
            bos_token_id=151_643,
            eos_token_ids=(151_645, 151_643),
        ),
    }
)


def shape(name: str, *, field: str = "shape") -> ModelConfig:
    """The shape of that name.

    Args:
        name: one of ``SHAPES``.
        field: what an error calls it.

    Raises:
        InputError: there is no such shape; names those that there are.
    """
    found = SHAPES.get(name)
    if found is None:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(field, f"must be one of {', '.join(SHAPES)}, not {shown(name)}{hint}")
    return found
