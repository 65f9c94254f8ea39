"""Named shapes against the parameter counts their model cards publish, and against a config.json read as usual."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nf.config import ModelConfig
from nf.errors import InputError
from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.models.shapes import SHAPES, shape

PUBLISHED = {  # parameters, as the hub counts them in the safetensors files
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
}


def parameters(config: ModelConfig) -> int:
    model = declare(config)
    ends = [model.embed, model.final_norm] + ([] if config.tie_word_embeddings else [model.lm_head])
    layer = sum(math.prod(weight.shape) for weight in model.layer_weights)
    return sum(math.prod(weight.shape) for weight in ends) + config.num_layers * layer


def test_every_shape_is_held_against_its_published_size() -> None:
    assert {name: parameters(config) for name, config in SHAPES.items()} == PUBLISHED


def test_a_shape_is_what_its_config_json_reads_as(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "attention_bias": False,
                "bos_token_id": 128000,
                "eos_token_id": 128001,
                "hidden_act": "silu",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "max_position_embeddings": 8192,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_scaling": None,
                "rope_theta": 500000.0,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
                "vocab_size": 128256,
            }
        )
    )
    assert read_config(tmp_path) == shape("llama-3-8b")


def test_an_unknown_shape_names_the_choices() -> None:
    with pytest.raises(InputError, match=r"^shape: must be one of llama-3-8b, .*, not 'llama-3-9b'; did you mean"):
        shape("llama-3-9b")
    with pytest.raises(InputError, match=r"^model: must be one of .*qwen3-8b, not 'gpt-2'$"):
        shape("gpt-2", field="model")
