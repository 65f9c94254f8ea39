"""Weights in the layout the CPU operations want."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.executors.cpu_gemm import Projection
from nf.models.declaration import GATE_UP_INTERLEAVE, Array, ModelWeights

Float32 = NDArray[np.float32]

_INTERLEAVED = {"gate_up_proj", "moe_gate_up_proj"}


@dataclass(frozen=True, slots=True)
class CpuLayer:
    """The weights of a layer by name. All of gate comes before all of up, so that both are contiguous."""

    vectors: dict[str, Float32]  # norms and biases
    projections: dict[str, Projection]
    experts: dict[str, tuple[Projection, ...]]


@dataclass(frozen=True, slots=True)
class CpuWeights:
    """All weights, float32."""

    embed: Float32  # [vocab_size, hidden_size]
    final_norm: Float32
    lm_head: Projection
    layers: tuple[CpuLayer, ...]


def prepare(weights: ModelWeights) -> CpuWeights:
    """Convert loaded weights; what is float32 already and needs no new layout shares memory with them."""
    embed = _float32(weights.embed)
    lm_head = embed if weights.lm_head is weights.embed else _float32(weights.lm_head)
    layers = tuple(_layer(layer) for layer in weights.layers)
    return CpuWeights(embed, _float32(weights.final_norm), Projection.of(lm_head), layers)


def _layer(weights: dict[str, Array]) -> CpuLayer:
    layer = CpuLayer({}, {}, {})
    for name, array in weights.items():
        array = _float32(array)
        if name in _INTERLEAVED:
            *experts, rows, inner = array.shape
            blocks = array.reshape(*experts, -1, 2, GATE_UP_INTERLEAVE, inner)
            array = np.moveaxis(blocks, -3, -4).reshape(*experts, rows, inner)
        if array.ndim == 1:
            layer.vectors[name] = array
        elif array.ndim == 2:
            layer.projections[name] = Projection.of(array)
        else:
            layer.experts[name] = tuple(Projection.of(expert) for expert in array)
    return layer


def _float32(array: Array) -> Float32:
    return np.ascontiguousarray(array, dtype=np.float32)
