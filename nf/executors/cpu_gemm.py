"""Matrix products whose rows do not depend on how many rows there are.

BLAS picks kernels, and with them the order of summation, by the shape of a product: with OpenBLAS 0.3.31 a row's last
bits change when the product has 1, 2 or 5 rows. One request's tokens would then depend on its neighbours. So every
product goes to BLAS as tiles of exactly ``TILE`` rows, the last one filled up with zeros: the shape is always the same,
and a row's bits depend on that row and the weight alone, provided that BLAS treats all rows of a tile alike. With 8
rows OpenBLAS does (tried: its kernels for Haswell, Zen, SkylakeX, Sandybridge, Nehalem and Prescott, on 1 and 2
threads); with 12 or more, those for Haswell and Zen do not.

Weights with up to 1024 inputs are also kept as panels of a few outputs, so small that OpenBLAS neither packs them (with
AVX-512) nor wakes its threads. For a model of a few million parameters that is three times as fast as whole products
of so few rows, and it does not collapse when other processes use the cores, because no thread spins until another one
gets its turn. Larger weights stay whole, and use as many threads as BLAS is told to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

TILE = 8  # rows
ONE_THREAD = 1 << 18  # rows · in · out up to which OpenBLAS runs a product on the calling thread
PANELS = (64, 32)  # outputs per panel, the first that keeps to one thread; with fewer the calls cost too much


@dataclass(frozen=True, slots=True)
class Projection:
    """A weight, cut by outputs."""

    panels: Float32  # [panels, in, outputs per panel]
    rest: Float32  # [in, remaining outputs]

    @classmethod
    def of(cls, weight: Float32) -> Projection:
        """From [out, in]; shares memory with ``weight`` where that is not cut into panels."""
        outputs, inputs = weight.shape
        panel = next((size for size in PANELS if TILE * inputs * size <= ONE_THREAD), outputs + 1)
        split = outputs // panel * panel
        panels = weight[:split].reshape(-1, panel, inputs) if split else np.zeros((0, 1, inputs), np.float32)
        return cls(np.ascontiguousarray(panels.swapaxes(1, 2)), weight[split:].T)

    @property
    def outputs(self) -> int:
        count, _, panel = self.panels.shape
        return int(count * panel + self.rest.shape[1])


def project(x: Float32, weight: Projection, out: Float32) -> None:
    """Write x·weight to ``out``; x is [rows, in], out [rows, out], both C-contiguous."""
    rows, inputs = x.shape
    whole = rows - rows % TILE
    if whole:
        _multiply(x[:whole].reshape(-1, TILE, inputs), weight, out[:whole].reshape(-1, TILE, out.shape[1]))
    if whole < rows:
        tile = np.zeros((1, TILE, inputs), np.float32)
        tile[0, : rows - whole] = x[whole:]
        result = np.empty((1, TILE, out.shape[1]), np.float32)
        _multiply(tile, weight, result)
        out[whole:] = result[0, : rows - whole]


def _multiply(x: Float32, weight: Projection, out: Float32) -> None:
    """The same for tiles: x [tiles, TILE, in], out [tiles, TILE, out]."""
    count, _, panel = weight.panels.shape
    split = count * panel
    if count:
        places = out[:, :, :split].reshape(len(x), TILE, count, panel).swapaxes(1, 2)  # a view
        np.matmul(x[:, None], weight.panels, out=places)
    if split < out.shape[2]:
        np.matmul(x, weight.rest, out=out[:, :, split:])
