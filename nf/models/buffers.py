"""How wide the buffers are that a model's operations read and write."""

from __future__ import annotations

from nf.config import ModelConfig


def row_widths(config: ModelConfig) -> dict[str, int]:
    """Values per token in each buffer that operations name."""
    heads = config.num_heads * config.head_dim
    return {
        "hidden": config.hidden_size,
        "normed": config.hidden_size,
        "qkv": config.qkv_size,
        "q": heads,
        "kv": 2 * config.num_kv_heads * config.head_dim,
        "attn": heads,
        "routing": 2 * config.experts_per_token,
        "activated": config.intermediate_size * max(1, config.experts_per_token),
    }
