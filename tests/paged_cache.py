"""The paged KV cache's layout, both ways, of arrays and of tensors; see nf/kernels/kv_cache.py."""

from __future__ import annotations

from typing import Any

import numpy as np


def swizzled(plain: Any) -> Any:
    """[pages, heads, 2, page_size, head_dim] → [pages, heads, 2, head_dim/64, page_size, 64] as the cache has it."""
    *outer, page_size, head_dim = plain.shape
    chunks = plain.reshape(*outer, page_size, head_dim // 64, 8, 8).swapaxes(-4, -3)
    return _swap(chunks).reshape(*outer, head_dim // 64, page_size, 64)


def unswizzled(cache: Any) -> Any:
    """The way back."""
    *outer, slabs, page_size, _ = cache.shape
    chunks = _swap(cache.reshape(*outer, slabs, page_size, 8, 8))
    return chunks.swapaxes(-4, -3).reshape(*outer, page_size, 64 * slabs)


def _swap(chunks: Any) -> Any:
    """[…, rows, 8 chunks, 8]: chunk c of row r to chunk c ^ (r mod 8), and back."""
    rows = chunks.shape[-3]
    return chunks[..., np.arange(rows)[:, None], np.arange(8) ^ np.arange(rows)[:, None] % 8, :]
