"""ModelConfig: the shape of a model. EngineConfig: how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "bfloat16", "float16", "float32"]
Preemption = Literal["auto", "swap", "recompute"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding; ``factor`` scales "linear" and "llama3", the fields after it "llama3" alone."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only transformer, as read from config.json and generation_config.json."""

    architecture: str  # e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0  # 0: dense FFN
    experts_per_token: int = 0
    sliding_window: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qkv_size(self) -> int:
        """Rows of the fused qkv projection: (heads + 2·kv_heads)·head_dim."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run; the fields users know from vLLM keep their names.

    ``max_num_batched_tokens`` is the dense batch size B_dense. ``max_num_seqs`` None: 256 on the CPU, 2048 on the GPU,
    and never more than the dense batch has rows. ``num_pages`` and ``num_host_pages`` override the sizes derived from
    memory. ``plan`` is a built-in plan's name or a JSON file; None takes those measured to be the fastest for the
    model's shape, the GPU and what a step holds, and where nothing was measured the sequential one. ``random_weights``
    draws the weights (with ``seed``) instead of reading them; the model may then also be one of nf.models.shapes.
    """

    dtype: DType = "auto"
    seed: int = 0
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    page_size: int = 16
    num_pages: int | None = None
    num_host_pages: int | None = None
    preemption: Preemption = "auto"
    device: Device = "auto"
    plan: str | None = None
    random_weights: bool = False
