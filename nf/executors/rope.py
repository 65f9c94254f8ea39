"""Rotary position embedding (Su et al., arXiv 2104.09864), rotating the two halves of a head against each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nf.config import RopeConfig

Float32 = NDArray[np.float32]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float32:
    """Angle per position of each pair of dimensions, float32 [head_dim / 2], radians.

    Computed in float32 as transformers does, because at position p an error in a frequency counts p times.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Float32 = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    if rope.kind == "linear":
        frequencies /= np.float32(rope.factor)
    if rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Float32) -> Float32:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    context = rope.original_max_position_embeddings
    wavelengths = np.float32(2 * np.pi) / frequencies  # positions per turn
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    stretched = frequencies / np.float32(rope.factor)
    kept_share = (np.float32(context) / wavelengths - low) / (high - low)
    between = (1 - kept_share) * stretched + kept_share * frequencies
    result = np.where(wavelengths > context / low, stretched, between)
    return np.where(wavelengths < context / high, frequencies, result).astype(np.float32)


def rotary_table(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[Float32, Float32]:
    """Cosines and sines of every position, two float32 arrays [num_positions, head_dim / 2]."""
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return np.cos(angles), np.sin(angles)


def rotate(x: Float32, cos: Float32, sin: Float32, out: Float32) -> None:
    """Rotate heads into ``out``; both are [tokens, heads, head_dim], cos and sin [tokens, head_dim / 2]."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x[..., :half], x[..., half:]
    np.multiply(first, cos, out=out[..., :half])
    out[..., :half] -= second * sin
    np.multiply(second, cos, out=out[..., half:])
    out[..., half:] += first * sin
