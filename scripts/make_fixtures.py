"""Write tests/fixtures: small random models of every architecture and what Hugging Face transformers makes of them.

    pip install torch transformers safetensors
    python scripts/make_fixtures.py [NAME ...]

Each fixture is a model directory plus expected.npz, computed in float32 with eager attention and no KV cache:

    prompt  int32 [P]           random token ids
    greedy  int32 [G]           the most likely token after each step
    logits  float32 [P+G-1, V]  row i predicts token i + 1 of prompt + greedy

Weights are scaled so that logits are well spread. A seed is taken only if every greedy choice wins by a clear margin
and the text does not fall into a short loop.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
PROMPT_TOKENS = 45
GREEDY_TOKENS = 24
MIN_MARGIN = 0.05  # between the two most likely tokens, in logits; 500 times the tolerance of the parity test
MIN_DISTINCT = 12  # different tokens among the greedy ones

SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Case:
    """One fixture; ``classic`` rewrites config.json with the keys of transformers 4."""

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "10MB"
    classic: bool = False


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # short enough that all three bands of frequencies occur
}

CASES = (
    Case("llama", "llama", {"eos_token_id": [2, 3]}, max_shard_size="60KB"),
    Case(
        "llama-tied-llama3",
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
        dtype=torch.bfloat16,
        classic=True,
    ),
    Case(
        "llama-bias-linear",
        "llama",
        {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}},
        classic=True,
    ),
    # DeepSeek-67B is a Llama with many heads per KV head, eps 1e-6 and a vocabulary of its own.
    Case(
        "deepseek",
        "llama",
        {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
        dtype=torch.bfloat16,
        classic=True,
    ),
    Case("mistral", "mistral", {"sliding_window": 12, "head_dim": 12}),  # far shorter than the prompt
    Case("qwen2", "qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, dtype=torch.float16),
    Case("qwen3", "qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    Case("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, dtype=torch.bfloat16),
)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)  # sums in one order
    for case in CASES:
        if not names or case.name in names:
            write(case)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": np.__version__,
    }
    (FIXTURES / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def write(case: Case) -> None:
    seed = next(seed for seed in range(1000) if is_telling(*run(build(case, seed), seed)))
    model = build(case, seed)
    out = FIXTURES / case.name
    shutil.rmtree(out, ignore_errors=True)
    model.to(case.dtype).save_pretrained(out, max_shard_size=case.max_shard_size)
    if case.classic:
        use_classic_keys(out / "config.json")
    # What is on disk is what is run, in float32.
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    prompt, greedy, logits = run(model, seed)
    np.savez_compressed(out / "expected.npz", prompt=prompt, greedy=greedy, logits=logits)
    size = sum(file.stat().st_size for file in out.iterdir())
    least = margin(logits)
    print(f"{case.name}: seed {seed}, logits std {logits.std():.2f}, least margin {least:.3f}, {size / 1e3:.0f} kB")


def build(case: Case, seed: int) -> torch.nn.Module:
    """A random model whose weights are already those of ``case.dtype``."""
    config = AutoConfig.for_model(case.model_type, **(SIZES | case.config))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = 1 + 0.3 * noise
            elif name.endswith("bias"):
                value = 0.5 * noise
            elif "embed_tokens" in name or "lm_head" in name:
                value = (0.15 if config.tie_word_embeddings else 0.4) * noise  # tied, a large one predicts itself
            else:
                value = noise * parameter.shape[-1] ** -0.5 * 1.3
            parameter.copy_(value.to(case.dtype).to(torch.float32))
    return model


def run(model: torch.nn.Module, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed + 10_000)
    prompt = torch.randint(4, model.config.vocab_size, (PROMPT_TOKENS,), generator=generator)
    tokens = prompt
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            logits = model(tokens[None], use_cache=False).logits[0]
            tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
    return prompt.numpy().astype(np.int32), tokens[PROMPT_TOKENS:].numpy().astype(np.int32), logits.numpy()


def is_telling(_prompt: np.ndarray, greedy: np.ndarray, logits: np.ndarray) -> bool:
    return margin(logits) >= MIN_MARGIN and len(set(greedy.tolist())) >= MIN_DISTINCT


def margin(logits: np.ndarray) -> float:
    """Least distance between the best and the second best logit over the greedy steps."""
    best = np.sort(logits[PROMPT_TOKENS - 1 :], axis=-1)
    return float((best[:, -1] - best[:, -2]).min())


def use_classic_keys(path: Path) -> None:
    """Rewrite a config.json of transformers 5 as transformers 4 would have written it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
