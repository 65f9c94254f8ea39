"""Weights in the layout the CPU operations want: float32, projections as [in, out]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.models.declaration import GATE_UP_INTERLEAVE, Array, ModelWeights

Float32 = NDArray[np.float32]

_PROJECTIONS = {"qkv_proj", "o_proj", "down_proj", "router", "moe_down_proj"}
_GATED = {"gate_up_proj", "moe_gate_up_proj"}


@dataclass(frozen=True, slots=True)
class CpuWeights:
    """float32. In ``layers`` projections are [in, out] and gate_up is [in, 2I], all of gate before all of up."""

    embed: Float32  # [vocab_size, hidden_size]
    final_norm: Float32
    lm_head: Float32  # [hidden_size, vocab_size], a view of the loaded matrix: it may share memory with ``embed``
    layers: tuple[dict[str, Float32], ...]


def prepare(weights: ModelWeights) -> CpuWeights:
    """Convert loaded weights; only what is already float32 and needs no new layout shares memory with them."""
    embed = _float32(weights.embed)
    lm_head = embed if weights.lm_head is weights.embed else _float32(weights.lm_head)
    layers = tuple({name: _layout(name, array) for name, array in layer.items()} for layer in weights.layers)
    return CpuWeights(embed, _float32(weights.final_norm), lm_head.T, layers)


def _layout(name: str, array: Array) -> Float32:
    array = _float32(array)
    if name in _GATED:
        *experts, rows, inner = array.shape
        blocks = array.reshape(*experts, -1, 2, GATE_UP_INTERLEAVE, inner)
        array = np.moveaxis(blocks, -3, -4).reshape(*experts, rows, inner)
    if name in _GATED | _PROJECTIONS:
        array = np.ascontiguousarray(np.swapaxes(array, -1, -2))
    return array


def _float32(array: Array) -> Float32:
    return np.ascontiguousarray(array, dtype=np.float32)
