"""Logits of an executor against Hugging Face transformers in float32: every position of a sequence, teacher-forced.

A checkpoint of random bfloat16 weights is written; transformers runs it in float32, and for comparison in bfloat16, on
the device that the executor runs on. The executor sees the sequence in chunks, its end token by token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executor_cases import BatchMaker, Part, RunsLogits
from gpu_runs import gpu_executor
from numpy.typing import NDArray
from safetensors.torch import save_file

from nf.graphs.plan import PipelinePlan
from nf.models.declaration import Model
from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.weights import checkpoint_parts, is_tied

TOKENS = 512
CHUNKS = (200, 1, 70, 217)  # of them; the rest comes token by token
PAGE, NUM_PAGES = 16, 48
DENSE_BATCH_SIZE = 256
ERROR, AGREEMENT = 2e-2, 0.99  # most and least that are accepted of a Parity

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Case:
    """A model: config.json at full width, and what is smaller where seconds count."""

    full: dict[str, Any]
    small: dict[str, Any]

    def config(self, *, small: bool) -> dict[str, Any]:
        return COMMON | self.full | (SMALL | self.small if small else {})


COMMON = {"num_hidden_layers": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "torch_dtype": "bfloat16"}
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096, "num_attention_heads": 8, "head_dim": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip

CASES = {
    "llama": Case(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
            "intermediate_size": 14336, "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": False,
        },
        {"num_key_value_heads": 2},
    ),
    "mistral": Case(
        {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
            "intermediate_size": 14336, "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "rope_theta": 10000.0, "sliding_window": 200, "tie_word_embeddings": False,
        },
        {"num_key_value_heads": 1},
    ),
    "qwen2": Case(
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
            "intermediate_size": 18944, "vocab_size": 152064, "num_attention_heads": 28, "num_key_value_heads": 4,
            "head_dim": 128, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        },
        {"num_key_value_heads": 8},
    ),
    "qwen3": Case(
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
            "intermediate_size": 12288, "vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
        },
        {"num_key_value_heads": 4, "head_dim": 128},
    ),
    "mixtral": Case(
        {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
            "intermediate_size": 14336, "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "rope_theta": 1000000.0, "sliding_window": None, "num_local_experts": 8,
            "num_experts_per_tok": 2, "tie_word_embeddings": False,
        },
        {"num_key_value_heads": 4},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parity:
    """How far logits are from those of float32 arithmetic.

    Args:
        error: largest |found − expected| / |expected| of any position, Euclidean over the vocabulary.
        mean_error: the mean over positions.
        agreement: share of positions with the same most likely token.
    """

    error: float
    mean_error: float
    agreement: float

    @classmethod
    def of(cls, found: Float32, expected: Float32) -> Parity:
        errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        errors = np.nan_to_num(errors, nan=np.inf)
        agreement = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
        return cls(float(errors.max()), float(errors.mean()), float(agreement))

    def __str__(self) -> str:
        return f"error {self.error:.4f} (mean {self.mean_error:.4f}), top-1 agreement {100 * self.agreement:.2f} %"


def write_checkpoint(model_dir: Path, config: dict[str, Any], seed: int = 0, device: str = "cpu") -> Model:
    """config.json and random bfloat16 weights: matrices with variance 1 / columns, the embedding with variance 1, so
    that what layers add is as large as what they read.

    Rows of the head differ in length, as those of trained models do; with equal ones more than one in a hundred
    positions would have two tokens so nearly equal that bfloat16 cannot tell them apart. Experts are chosen by the
    first dimensions of a token's embedding, which no layer writes, and not by near ties that rounding turns around.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(config))
    model = declare(read_config(model_dir))
    experts, chosen = model.config.num_experts, model.config.experts_per_token
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        if len(shape) == 1:
            return values / 2 if name.endswith(".bias") else (values / 4).exp()
        is_embed = name.endswith("embed_tokens.weight")
        if not is_embed:
            values /= shape[-1] ** 0.5
        if name == "lm_head.weight":
            values *= (1.5 * torch.randn(shape[0], 1, generator=generator, device=device)).exp()
        if not experts:
            return values
        if is_embed:
            code = torch.rand(shape[0], experts, generator=generator, device=device).topk(chosen).indices
            amounts = (4.0 + torch.arange(chosen, device=device)).expand_as(code)
            values[:, :experts] = torch.zeros(shape[0], experts, device=device).scatter(1, code, amounts)
        elif name.endswith("block_sparse_moe.gate.weight"):
            values.zero_()
            values[torch.arange(experts), torch.randperm(experts, generator=generator, device=device)] = 2
        elif name.endswith(("o_proj.weight", "w2.weight")):
            values[:experts] = 0
        return values

    ends = [model.embed, model.final_norm] + ([] if is_tied(model) else [model.lm_head])
    parts = [part for weight in ends for part in checkpoint_parts(weight)]
    for layer in range(model.config.num_layers):
        parts += [part for weight in model.layer_weights for part in checkpoint_parts(weight, layer)]
    tensors = {name: draw(name, shape).to(torch.bfloat16).cpu() for name, shape in parts}
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    return model


def token_ids(model: Model, count: int = TOKENS, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, model.config.vocab_size, count).tolist()
    return ids


def reference_logits(model_dir: Path, ids: Sequence[Sequence[int]], device: str) -> tuple[Float32, Float32]:
    """Logits of every position of sequences of one length, one sequence after the other, as transformers computes them
    in float32 and in bfloat16: [tokens, vocab_size] each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation="eager")
        model.eval().to(device)
        inputs = torch.tensor(ids, device=device)
        with torch.inference_mode():
            in_bf16 = model(inputs).logits.flatten(0, 1).float().cpu().numpy()
            in_fp32 = model.float()(inputs).logits.flatten(0, 1).cpu().numpy()
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    return in_fp32, in_bf16


def executor_logits(run: RunsLogits, ids: Sequence[int], chunks: Sequence[int] = CHUNKS) -> Float32:
    """Logits of every position as an executor computes them in chunks of these sizes, then token by token."""
    batches = BatchMaker(PAGE, NUM_PAGES, -(-len(ids) // PAGE), np.random.default_rng(0))
    parts, start = [], 0
    for count in [*chunks, *[1] * (len(ids) - sum(chunks))]:
        parts.append(Part(0, start, list(ids[start : start + count]), decode=start >= sum(chunks)))
        start += count
    found = []
    for part in parts:
        batch = batches.batch([part])
        found.append(run.logits(batch, np.arange(batch.num_tokens, dtype=np.int32)))
    return np.concatenate(found)


def measure(model: Model, model_dir: Path, plan: PipelinePlan, sequences: int) -> tuple[Parity, Parity]:
    """How far the GPU executor is from float32, and how far transformers itself is in bfloat16, over so many sequences
    of TOKENS."""
    ids = [token_ids(model, seed=seed) for seed in range(sequences)]
    expected, in_bf16 = reference_logits(model_dir, ids, "cuda")
    sizes = {"page_size": PAGE, "num_pages": NUM_PAGES, "num_host_pages": 0, "max_num_seqs": 16, "max_model_len": 640}
    with gpu_executor(model, model_dir, plan, **sizes) as run:
        found = np.concatenate([executor_logits(run, each) for each in ids])
    return Parity.of(found, expected), Parity.of(in_bf16, expected)
