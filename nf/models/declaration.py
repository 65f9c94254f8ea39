"""A model as data: its shape, the operations of one layer, and how its weights are named, fused and shaped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf.config import ModelConfig
from nf.models.operations import Operation

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Weight:
    """One (fused) weight and the checkpoint tensors it is made of.

    Args:
        name: as operations name it: ``qkv_proj``, ``attn_norm``, …
        shape: after fusion; matrices are [out, in] (y = x·Wᵀ), experts have a leading [num_experts].
        parts: checkpoint tensor names, fused along the out dimension in this order; ``{layer}`` and ``{expert}`` are
            filled in.
        part_rows: out-dimension size of each part.
        interleaved: rows alternate between the parts (gate₀, up₀, gate₁, up₁, …) instead of following one another, so
            that a GEMM's epilogue holds both halves of SwiGLU.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    part_rows: tuple[int, ...]
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """Declaration of a model: what an executor must be able to run and what a loader must find."""

    config: ModelConfig
    operations: tuple[Operation, ...]  # of one layer, in logical order
    layer_weights: tuple[Weight, ...]
    embed: Weight  # [vocab_size, hidden_size]
    final_norm: Weight  # [hidden_size]
    lm_head: Weight  # [vocab_size, hidden_size]; names embed's tensor when tied


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Loaded weights in their fused shapes; ``lm_head is embed`` when tied."""

    embed: Array
    final_norm: Array
    lm_head: Array
    layers: tuple[dict[str, Array], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes held, a tied embedding counted once."""
        arrays = {id(a): a for a in (self.embed, self.final_norm, self.lm_head)}
        arrays |= {id(a): a for layer in self.layers for a in layer.values()}
        return int(np.sum([a.nbytes for a in arrays.values()]))
