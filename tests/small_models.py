"""Model directories with random weights and a tokenizer of bytes, as small as they can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from engine_doubles import EOS, byte_tokenizer_spec
from safetensors.numpy import save_file

from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.weights import checkpoint_parts

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": EOS,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def write_model(model_dir: Path, *, seed: int = 0, tokenizer: bool = True, **config: Any) -> Path:
    """Write config.json, random model.safetensors and, if wanted, tokenizer.json with a chat template."""
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(CONFIG | config))
    model = declare(read_config(model_dir))
    rng = np.random.default_rng(seed)
    ends = [model.embed, model.final_norm] + ([] if model.config.tie_word_embeddings else [model.lm_head])
    parts = [part for weight in ends for part in checkpoint_parts(weight)]
    for layer in range(model.config.num_layers):
        parts += [part for weight in model.layer_weights for part in checkpoint_parts(weight, layer)]
    save_file({name: _draw(rng, shape) for name, shape in parts}, model_dir / "model.safetensors")
    if tokenizer:
        (model_dir / "tokenizer.json").write_text(byte_tokenizer_spec())
        (model_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return model_dir


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Norms near one; matrices large enough for the logits to differ clearly."""
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (2 * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
