"""config.json and generation_config.json: real models' files, both generations of keys, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nf.config import RopeConfig
from nf.errors import ModelError
from nf.models.hf_config import read_config, read_sampling_defaults

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31_70B = LLAMA2_7B | {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA31_ROPE,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
DEEPSEEK_67B = LLAMA2_7B | {
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "num_hidden_layers": 95,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}
MISTRAL_7B = LLAMA2_7B | {
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B = QWEN25_05B | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}
MIXTRAL_8X7B = MISTRAL_7B | {
    "architectures": ["MixtralForCausalLM"],
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}


def write(directory: Path, config: Any, generation: Any = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_llama2(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, LLAMA2_7B))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 11008)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (32, 32, 32, 128)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.dtype) == (1e-5, 4096, "float16")
    assert config.rope == RopeConfig(theta=10_000.0)  # Llama 2's file leaves rope_theta out
    assert not any([config.tie_word_embeddings, config.qkv_bias, config.o_bias, config.qk_norm, config.num_experts])
    assert (config.bos_token_id, config.eos_token_ids, config.sliding_window) == (1, (2,), None)


def test_llama31_and_deepseek_67b(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, LLAMA31_70B))
    assert config.rope == RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.qkv_size == (64 + 2 * 8) * 128
    config = read_config(write(tmp_path, DEEPSEEK_67B))
    assert (config.num_layers, config.head_dim, config.rms_norm_eps, config.vocab_size) == (95, 128, 1e-6, 102400)
    assert config.rope == RopeConfig(10_000.0)


def test_keys_of_transformers_5_mean_the_same(tmp_path: Path) -> None:
    classic = read_config(write(tmp_path, LLAMA31_70B))
    renamed = {k: v for k, v in LLAMA31_70B.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    renamed |= {"dtype": "bfloat16", "rope_parameters": LLAMA31_ROPE | {"rope_theta": 500000.0}}
    assert read_config(write(tmp_path, renamed)) == classic


def test_linear_rope_by_its_oldest_name(tmp_path: Path) -> None:
    config = LLAMA2_7B | {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100000}
    assert read_config(write(tmp_path, config)).rope == RopeConfig(100_000.0, "linear", 4.0)


def test_qwen2_has_bias_and_qwen3_norms(tmp_path: Path) -> None:
    qwen2 = read_config(write(tmp_path, QWEN25_05B))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.tie_word_embeddings) == (True, False, False, True)
    assert (qwen2.head_dim, qwen2.sliding_window) == (64, None)
    qwen3 = read_config(write(tmp_path, QWEN3_06B))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)
    biased = read_config(write(tmp_path, QWEN3_06B | {"attention_bias": True}))
    assert (biased.qkv_bias, biased.o_bias) == (True, True)


def test_mixtral_experts(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, MIXTRAL_8X7B))
    assert (config.num_experts, config.experts_per_token, config.sliding_window) == (8, 2, None)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MISTRAL_7B, 4096),
        (MISTRAL_7B | {"sliding_window": None}, None),
        ({k: v for k, v in MISTRAL_7B.items() if k != "sliding_window"}, 4096),  # transformers' default
        (LLAMA2_7B | {"sliding_window": 4096}, None),  # Llama has no such thing
        (QWEN25_05B | {"use_sliding_window": True, "max_window_layers": 0}, 32768),
        (QWEN25_05B | {"use_sliding_window": True, "max_window_layers": 24}, None),
        (QWEN25_05B | {"layer_types": ["full_attention"] * 24}, None),
        (QWEN25_05B | {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 24}, 32768),
        (MISTRAL_7B | {"layer_types": ["sliding_attention"] * 32}, 4096),
    ],
)
def test_sliding_window(tmp_path: Path, config: dict[str, Any], window: int | None) -> None:
    assert read_config(write(tmp_path, config)).sliding_window == window


def test_eos_comes_from_the_generation_config_first(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, QWEN25_05B, {"eos_token_id": [151645, 151643]})).eos_token_ids == (
        151645,
        151643,
    )
    assert read_config(write(tmp_path, QWEN25_05B, {"eos_token_id": None})).eos_token_ids == (151645,)
    assert read_config(write(tmp_path, QWEN25_05B | {"eos_token_id": None}, {})).eos_token_ids == ()
    beyond = read_config(write(tmp_path, LLAMA2_7B | {"eos_token_id": [2, -1, 32000]}, {}))
    assert beyond.eos_token_ids == (2,)  # others can never be sampled


def test_sampling_defaults(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == {}
    recommended = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": None,
        "repetition_penalty": 1.1,
        "eos_token_id": 2,
        "max_length": 4096,
    }
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    assert read_sampling_defaults(write(tmp_path, {}, recommended)) == expected
    greedy = read_sampling_defaults(write(tmp_path, {}, recommended | {"do_sample": False}))
    assert greedy == {"temperature": 0.0, "repetition_penalty": 1.1}


def test_sampling_defaults_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p: must be in \(0, 1\], not 1\.5"):
        read_sampling_defaults(write(tmp_path, {}, {"top_p": 1.5}))


QUANTIZED = {"quantization_config": {"quant_method": "gptq"}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA2_7B | {"architectures": ["GPT2LMHeadModel"]}, "architectures names 'GPT2LMHeadModel'.*LlamaForCausalLM"),
        (LLAMA2_7B | {"architectures": []}, "architectures must be a list"),
        (LLAMA2_7B | {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu' is"),
        (LLAMA2_7B | {"mlp_bias": True}, "mlp_bias is true"),
        (LLAMA2_7B | QUANTIZED, "quantization_config is not supported.*bfloat16"),
        (
            LLAMA2_7B | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type is 'yarn'.*llama3",
        ),
        (LLAMA2_7B | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type is 'dynamic'"),
        (LLAMA2_7B | {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type is 'longrope'"),
        (LLAMA2_7B | {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor must be a number above 0"),
        (
            LLAMA2_7B | {"rope_scaling": LLAMA31_ROPE | {"high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor 1 must be above",
        ),
        (LLAMA2_7B | {"rope_scaling": "linear"}, "rope_scaling must be an object"),
        (LLAMA2_7B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA2_7B | {"rope_theta": 0}, "rope_theta must be a number above 0"),
        (LLAMA2_7B | {"num_key_value_heads": 5}, "num_attention_heads 32 must be a multiple of num_key_value_heads 5"),
        (LLAMA2_7B | {"intermediate_size": 11004}, "intermediate_size 11004 must be a multiple of 8"),
        (LLAMA2_7B | {"hidden_size": 4100}, "hidden_size 4100 must be a multiple of num_attention_heads 32"),
        (LLAMA2_7B | {"head_dim": 127}, "head_dim must be even"),
        (LLAMA2_7B | {"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, not 0"),
        (LLAMA2_7B | {"num_hidden_layers": 10**12}, "num_hidden_layers must be at most 2147483647, not 1000000000000"),
        (LLAMA2_7B | {"rms_norm_eps": 10**400}, "rms_norm_eps must be a number above 0, not 1000"),
        (LLAMA2_7B | {"rope_theta": float("inf")}, "rope_theta must be a number above 0, not inf"),
        (MISTRAL_7B | {"sliding_window": 10**40}, "sliding_window must be at most 2147483647"),
        (LLAMA2_7B | {"vocab_size": "many"}, "vocab_size must be an integer"),
        ({k: v for k, v in LLAMA2_7B.items() if k != "hidden_size"}, "hidden_size is missing"),
        (LLAMA2_7B | {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        (LLAMA2_7B | {"rms_norm_eps": None}, "rms_norm_eps must be a number above 0"),
        (
            LLAMA2_7B | {"torch_dtype": "float8_e4m3fn"},
            "torch_dtype is 'float8_e4m3fn'.*bfloat16, float16, float32 are",
        ),
        (LLAMA2_7B | {"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
        (MIXTRAL_8X7B | {"num_experts_per_tok": 9}, "num_experts_per_tok 9 must be at most num_local_experts 8"),
        (QWEN25_05B | {"use_sliding_window": True}, "max_window_layers is 21; a window in only some of 24 layers"),
        (
            QWEN25_05B | {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]},
            "layer_types is supported where",
        ),
        (MISTRAL_7B | {"layer_types": ["full_attention"] * 32}, "layer_types is supported where"),
        ([1, 2], "must hold a JSON object, not a list"),
    ],
)
def test_refusals_name_file_and_field(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        read_config(write(tmp_path, config))


def test_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelError, match=r"config\.json: is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ModelError, match=r"config\.json: is not valid JSON"):
        read_config(tmp_path)
    write(tmp_path, LLAMA2_7B)
    (tmp_path / "generation_config.json").write_text("nope")
    with pytest.raises(ModelError, match=r"generation_config\.json: is not valid JSON"):
        read_config(tmp_path)
