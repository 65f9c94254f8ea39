"""Write a checkpoint of a well-known shape with random weights, to measure engines that only read checkpoints.

    python scripts/random_checkpoint.py llama-3-8b /tmp/llama-3-8b

Matrices and embeddings are normal with standard deviation 0.02, norms are 1, biases 0, all bf16. Tensors are cut from
the same 16 million random values, each from a place of its own.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from nf.cli.parser import CommandParser
from nf.config import ModelConfig
from nf.errors import InputError
from nf.models.declaration import Weight
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.weights import checkpoint_parts

DEVIATION = 0.02
POOL_VALUES = 1 << 24


def write_checkpoint(config: ModelConfig, folder: Path, seed: int = 0) -> int:
    """Write config.json and safetensors files, one per layer and one for the ends; returns the bytes of all weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model = declare(config)
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(POOL_VALUES, np.float32) * np.float32(DEVIATION)).astype(ml_dtypes.bfloat16)
    ends = [model.embed, model.final_norm] + ([] if config.tie_word_embeddings else [model.lm_head])
    files: list[tuple[list[Weight], int]] = [(ends, 0)]
    files += [(list(model.layer_weights), layer) for layer in range(config.num_layers)]
    weight_map, size = {}, 0
    for number, (weights, layer) in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {
            part: _values(part, dims, pool, rng) for weight in weights for part, dims in checkpoint_parts(weight, layer)
        }
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=1) + "\n")
    return size


def _values(name: str, dims: tuple[int, ...], pool: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    if "norm" in name:
        return np.ones(dims, ml_dtypes.bfloat16)
    if name.endswith(".bias"):
        return np.zeros(dims, ml_dtypes.bfloat16)
    values = np.empty(math.prod(dims), pool.dtype)
    first = pool[int(rng.integers(len(pool))) :][: len(values)]
    values[: len(first)] = first
    values[len(first) :] = np.resize(pool, len(values) - len(first))
    return values.reshape(dims)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a shape: what transformers, and nf itself, read back as the same model."""
    rope = config.rope
    values: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "sliding_window": config.sliding_window,
    }
    if rope.kind != "default":
        values["rope_scaling"] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        values["rope_scaling"] |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    if config.num_experts:
        values |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    return values


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("shape", help="e.g. llama-3-8b")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        size = write_checkpoint(shape(args.shape), args.folder, args.seed)
    except InputError as error:
        print(f"random_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{size / 1e9:.2f} GB in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
