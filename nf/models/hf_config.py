"""Reading config.json and generation_config.json of a Hugging Face model directory.

Keys of transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``, ``dtype``) are
both understood. A value that would change results and is not implemented is an error, never ignored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args

from nf.config import ModelConfig, RopeConfig
from nf.errors import InputError, ModelError, shown
from nf.models.declaration import GATE_UP_INTERLEAVE
from nf.sampling_params import SamplingParams

CheckpointDType = Literal["bfloat16", "float16", "float32"]
RopeKind = Literal["default", "linear", "llama3"]

# What config.json may leave out and transformers' configuration classes then fill in (transformers 5.x, models/*/
# configuration_*.py). Sizes that no default could guess (hidden_size, …) are not here: they must be given.
_LLAMA = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
_MIXTRAL = _MISTRAL | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN2 = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "rope_theta": 10_000.0,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _MISTRAL,
        "Qwen2ForCausalLM": _QWEN2,
        "Qwen3ForCausalLM": _QWEN2 | {"head_dim": 128},
        "MixtralForCausalLM": _MIXTRAL,
    }
)

MAX_INTEGER = 2**31 - 1
"""Greatest size or count that config.json may name; what indexes rows, positions and pages has 32 bits."""

_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_config(model_dir: Path) -> ModelConfig:
    """The model's shape from ``config.json``, its EOS ids from ``generation_config.json`` where that has them.

    Raises:
        ModelError: a file is missing or malformed, or asks for something that is not supported.
    """
    path = model_dir / "config.json"
    fields = _read(path)
    architecture = _architecture(fields)
    fields = _Fields(path, dict(DEFAULTS[architecture]) | dict(fields.values))
    _refuse_unsupported(fields, architecture)

    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        fields.fail("num_attention_heads", f"{num_heads} must be a multiple of num_key_value_heads {num_kv_heads}")
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers")
    vocab_size = fields.integer("vocab_size")
    max_position_embeddings = fields.integer("max_position_embeddings")
    intermediate_size = fields.integer("intermediate_size")
    if intermediate_size % GATE_UP_INTERLEAVE:
        fields.fail("intermediate_size", f"{intermediate_size} must be a multiple of {GATE_UP_INTERLEAVE}")
    qkv_bias, o_bias = _attention_bias(fields, architecture)
    num_experts, experts_per_token = _experts(fields, architecture)
    bos_token_id = fields.token_ids("bos_token_id", vocab_size)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, hidden_size, num_heads),
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position_embeddings=max_position_embeddings,
        rope=_rope(fields, max_position_embeddings),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        sliding_window=_sliding_window(fields, architecture, num_layers),
        dtype=_dtype(fields),
        bos_token_id=bos_token_id[0] if bos_token_id else None,
        eos_token_ids=_eos_token_ids(fields, model_dir, vocab_size),
    )


def read_sampling_defaults(model_dir: Path) -> dict[str, Any]:
    """The SamplingParams that ``generation_config.json`` recommends; empty where it is missing or says nothing.

    ``do_sample: false`` means greedy: temperature 0, and what only matters when sampling is left out.

    Raises:
        ModelError: the file is malformed or a value is out of SamplingParams' range.
    """
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return {}
    values = _read(path).values
    found = {key: values[key] for key in _SAMPLING_KEYS if values.get(key) is not None}
    if values.get("do_sample") is False:
        found = {key: found[key] for key in ("repetition_penalty",) if key in found} | {"temperature": 0.0}
    try:
        SamplingParams(**found)
    except InputError as error:
        raise ModelError(str(path), str(error)) from error
    return found


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to a JSON object; every complaint names the file and the key."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""  # "rope_scaling." inside that object

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ModelError(str(self.path), f"{self.prefix}{key} {problem}")

    def integer(self, key: str, *, default: int | None = None, low: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fail(key, f"must be an integer of at least {low}, not {shown(value)}")
        if value > MAX_INTEGER:
            self.fail(key, f"must be at most {MAX_INTEGER}, not {shown(value)}")
        return value

    def number(self, key: str, *, low: float = 0.0) -> float:
        """A finite number above ``low``."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= sys.float_info.max:
            self.fail(key, f"must be a number above {low:g}, not {shown(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {shown(value)}")
        return bool(value)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of them or null; ids outside the vocabulary (-1 is in use) can never occur and are dropped."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for item in ids:
            if isinstance(item, bool) or not isinstance(item, int):
                self.fail(key, f"must be a token id or a list of token ids, not {shown(value)}")
        return tuple(dict.fromkeys(item for item in ids if 0 <= item < vocab_size))

    def object(self, key: str) -> _Fields:
        """The object under ``key``; null and a missing key read as an empty one."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.fail(key, f"must be an object, not {shown(value)}")
        return _Fields(self.path, {} if value is None else value, f"{key}.")


def _read(path: Path) -> _Fields:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(str(path), "does not exist; a model directory holds a config.json") from None
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ModelError(str(path), f"is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(str(path), f"must hold a JSON object, not a {type(values).__name__}")
    return _Fields(path, values)


def _architecture(fields: _Fields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        fields.fail("architectures", f"must be a list with one of {', '.join(DEFAULTS)}, not {shown(names)}")
    if names[0] not in DEFAULTS:
        fields.fail("architectures", f"names {shown(names[0])}, which is not supported; {', '.join(DEFAULTS)} are")
    return names[0]


def _refuse_unsupported(fields: _Fields, architecture: str) -> None:
    """Stop at everything that transformers would honour and nf would not."""
    for key in ("quantization_config", "compression_config"):
        if fields.values.get(key) is not None:
            fields.fail(key, "is not supported; give the unquantized bfloat16, float16 or float32 checkpoint")
    act = fields.values.get("hidden_act", "silu")
    if act not in ("silu", "swish"):  # two names of the same function
        fields.fail("hidden_act", f"is {act!r}, which is not supported; 'silu' is")
    if architecture == "LlamaForCausalLM" and fields.flag("mlp_bias"):
        fields.fail("mlp_bias", "is true, which is not supported; only feed-forward layers without bias are")


def _head_dim(fields: _Fields, hidden_size: int, num_heads: int) -> int:
    if fields.values.get("head_dim") is None and hidden_size % num_heads:
        fields.fail("hidden_size", f"{hidden_size} must be a multiple of num_attention_heads {num_heads}")
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        fields.fail("head_dim", f"must be even for rotary embeddings, not {head_dim}")
    return head_dim


def _attention_bias(fields: _Fields, architecture: str) -> tuple[bool, bool]:
    """Whether the qkv and the output projection have a bias. Qwen2 always has the first and never the second."""
    if architecture == "Qwen2ForCausalLM":
        return True, False
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        both = fields.flag("attention_bias")
        return both, both
    return False, False


def _experts(fields: _Fields, architecture: str) -> tuple[int, int]:
    if architecture != "MixtralForCausalLM":
        return 0, 0
    num_experts = fields.integer("num_local_experts")
    per_token = fields.integer("num_experts_per_tok")
    if per_token > num_experts:
        fields.fail("num_experts_per_tok", f"{per_token} must be at most num_local_experts {num_experts}")
    return num_experts, per_token


def _sliding_window(fields: _Fields, architecture: str, num_layers: int) -> int | None:
    """Tokens each token sees, itself included; None for all. One answer for all layers, or an error."""
    qwen = "use_sliding_window" in DEFAULTS[architecture]  # a window must be asked for, and may start at a later layer
    windowed = fields.values.get("sliding_window") is not None and (not qwen or fields.flag("use_sliding_window"))
    window = fields.integer("sliding_window") if windowed and architecture != "LlamaForCausalLM" else None
    first = fields.integer("max_window_layers", low=0) if qwen else 0
    types = fields.values.get("layer_types")
    if types is not None:
        sliding = [kind == "sliding_attention" for kind in types] if isinstance(types, list) else []
        uniform = len(set(sliding)) == 1 and (qwen or sliding[0] == (window is not None))
        if not uniform or (sliding[0] and window is None):
            fields.fail("layer_types", "is supported where all layers have sliding_window's attention or all full")
        return window if sliding[0] else None
    if window is None or first >= num_layers:
        return None
    if first > 0:
        fields.fail("max_window_layers", f"is {first}; a window in only some of {num_layers} layers is not supported")
    return window


def _rope(fields: _Fields, max_position_embeddings: int) -> RopeConfig:
    """``rope_scaling`` wins over ``rope_parameters`` where both are given, as in transformers."""
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    scaling = fields.object(key)
    theta = (scaling if scaling.values.get("rope_theta") is not None else fields).number("rope_theta")
    kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
    if kind not in get_args(RopeKind):
        scaling.fail("rope_type", f"is {kind!r}, which is not supported; {', '.join(get_args(RopeKind))} are")
    partial = scaling.values.get("partial_rotary_factor", fields.values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        fields.fail("partial_rotary_factor", f"is {partial!r}, which is not supported; 1 is")
    if kind == "default":
        return RopeConfig(theta)
    factor = scaling.number("factor")
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        scaling.fail("high_freq_factor", f"{high:g} must be above low_freq_factor {low:g}")
    original = scaling.integer("original_max_position_embeddings", default=max_position_embeddings)
    return RopeConfig(theta, "llama3", factor, low, high, original)


def _dtype(fields: _Fields) -> CheckpointDType:
    """``dtype`` or ``torch_dtype``; float32 where neither is given, which loses nothing."""
    key = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    name = fields.values.get(key)
    for known in get_args(CheckpointDType):
        if name in (known, f"torch.{known}"):
            return known  # type: ignore[no-any-return]
    if name is not None:
        fields.fail(key, f"is {name!r}, which is not supported; {', '.join(get_args(CheckpointDType))} are")
    return "float32"


def _eos_token_ids(fields: _Fields, model_dir: Path, vocab_size: int) -> tuple[int, ...]:
    generation = model_dir / "generation_config.json"
    if generation.is_file():
        found = _read(generation)
        if found.values.get("eos_token_id") is not None:
            return found.token_ids("eos_token_id", vocab_size)
    return fields.token_ids("eos_token_id", vocab_size)
