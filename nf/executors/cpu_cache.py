"""The paged KV cache in host memory, with its swap space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nf.config import ModelConfig
from nf.scheduler.batch import Batch, Int32

Float32 = NDArray[np.float32]


class PagedCache:
    """Keys and values, float32 [layers, kv_heads, pages, page_size, head_dim] each.

    Heads come before pages, so that gathering the pages of some sequences gives the matrices attention multiplies
    with. Memory is taken by the operating system when a page is first written.
    """

    def __init__(self, config: ModelConfig, *, page_size: int, num_pages: int, num_host_pages: int) -> None:
        def pages(count: int) -> Float32:
            shape = (config.num_layers, config.num_kv_heads, count, page_size, config.head_dim)
            return np.zeros(shape, np.float32)

        self.page_size = page_size
        self.keys, self.values = pages(num_pages), pages(num_pages)
        self.host_keys, self.host_values = pages(num_host_pages), pages(num_host_pages)

    def move_pages(self, batch: Batch) -> None:
        """Swap out, swap in and copy pages, in this order."""
        _copy(self.keys, self.host_keys, batch.swap_out)
        _copy(self.values, self.host_values, batch.swap_out)
        _copy(self.host_keys, self.keys, batch.swap_in)
        _copy(self.host_values, self.values, batch.swap_in)
        _copy(self.keys, self.keys, batch.page_copies)
        _copy(self.values, self.values, batch.page_copies)

    def append(self, layer: int, keys: Float32, values: Float32, pages: Int32, offsets: Int32) -> None:
        """Store keys and values, [tokens, kv_heads, head_dim], at (page, offset) of each token.

        Attention multiplies the values of masked positions by zero, and 0·NaN is NaN: a value that is not finite would
        leak into the next owner of its page. So it is stored as 0, and the key as NaN, which a mask does cover and
        which still turns everything that may look at it into NaN.
        """
        finite = np.isfinite(values)
        if not finite.all():
            values = np.where(finite, values, np.float32(0))
            keys = np.where(finite.all(axis=-1, keepdims=True), keys, np.float32(np.nan))
        self.keys[layer][:, pages, offsets] = keys.swapaxes(0, 1)
        self.values[layer][:, pages, offsets] = values.swapaxes(0, 1)


def _copy(source: Float32, destination: Float32, pairs: Int32) -> None:
    if len(pairs):
        destination[:, :, pairs[:, 1]] = source[:, :, pairs[:, 0]]
