"""A model as data: its shape, the operations of one layer, and how its weights are named, fused and shaped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf.config import ModelConfig
from nf.models.operations import Operation

Array = NDArray[Any]

GATE_UP_INTERLEAVE = 8
"""Rows of gate and up alternate in blocks of this many: gate 0 … 7, up 0 … 7, gate 8 … 15, … A thread of a WGMMA then
holds the gate and the up value of the same output, and SwiGLU is an epilogue of the GEMM."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One (fused) weight and the checkpoint tensors it is made of.

    Args:
        name: as operations name it: ``qkv_proj``, ``attn_norm``, …
        shape: after fusion; matrices are [out, in] (y = x·Wᵀ), experts have a leading [num_experts].
        parts: checkpoint tensor names, fused along the out dimension in this order; ``{layer}`` and ``{expert}`` are
            filled in.
        part_rows: out-dimension size of each part.
        interleave: 0 puts the parts one after the other; a number alternates between them in blocks of that many rows.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    part_rows: tuple[int, ...]
    interleave: int = 0


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
