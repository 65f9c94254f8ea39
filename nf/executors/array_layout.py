"""Arrays side by side in one block of bytes, so that a host copy and a device copy of all of them are one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 256  # bytes, as workspaces of kernels want it; no two arrays share a cache line either

ArrayShape = tuple[str, DTypeLike, tuple[int, ...]]
"""Name, dtype and shape of an array."""


class ArrayLayout:
    """Where each array begins in the block.

    Args:
        arrays: in order.
    """

    def __init__(self, arrays: Sequence[ArrayShape]) -> None:
        self._arrays = [(name, np.dtype(dtype), shape) for name, dtype, shape in arrays]
        self.offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}  # bytes of each array
        self.num_bytes = 0
        for name, dtype, shape in self._arrays:
            self.offsets[name] = self.num_bytes
            self.sizes[name] = dtype.itemsize * math.prod(shape)
            self.num_bytes += aligned(self.sizes[name])

    def views(self, block: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The arrays as views of a host block."""
        return {name: np.ndarray(shape, dtype, block.data, self.offsets[name]) for name, dtype, shape in self._arrays}

    def pointers(self, base: int) -> dict[str, int]:
        """Addresses of the arrays' first elements in a device block at ``base``."""
        return {name: base + offset for name, offset in self.offsets.items()}


def aligned(num_bytes: int) -> int:
    """Up to where the next array may begin."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
