"""Random weights: out[i] = N(0, std) in bf16, drawn on the device.

Philox4x32-10 (Salmon et al., SC'11) under the key ``seed`` at counters of (place in the tensor, number of the tensor),
and the method of Box and Muller. The same seed gives the same numbers on any grid. Bound by its writes.
"""

from __future__ import annotations

import ctypes

from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource

VECTOR = 8  # values of a 16-byte store
MAX_VALUES = 2**34  # of one tensor: what its 32-bit counters reach
_THREADS = 256
_CTAS = 8  # per multiprocessor

RANDOM_FILL = KernelSource(
    name="random_fill",
    language="cuda",
    files=("random_fill.cu", "memory.cuh", "philox.cuh", "hopper.cuh"),
    parameters=("pointer", "int64", "int64", "int32", "float32"),
    entry="random_fill",
)


def sources() -> list[KernelSource]:
    """One kernel; sizes are arguments."""
    return [RANDOM_FILL]


class RandomFill:
    """Launches the fill.

    Args:
        loader: of ``sources()``.
        sms: multiprocessors to spread over.
    """

    def __init__(self, loader: KernelLoader, *, sms: int) -> None:
        self._kernel = loader.cuda(RANDOM_FILL.name)
        self._grid = _CTAS * sms

    def launch(self, out: int, count: int, *, seed: int, tensor: int, std: float, stream: int) -> None:
        """Fill ``count`` values from the 16-byte aligned device pointer ``out``; whole vectors of 8 are written.

        Args:
            seed: 64 bits.
            tensor: another number gives other values.
            std: standard deviation.
        """
        assert 0 < count <= MAX_VALUES
        assert out % 16 == 0
        signed = ctypes.c_int64(seed).value  # the same 64 bits
        self._kernel.launch(
            out, -(-count // VECTOR), signed, tensor, std, grid=self._grid, block=_THREADS, stream=stream
        )
