"""Matrix products whose rows do not depend on how many rows there are.

BLAS picks kernels, and with them the order of summation, by the shape of a product: measured with OpenBLAS, a row's
result changes in its last bits when the batch has 1, 2 or 5 rows. That would let one request's tokens depend on its
neighbours. So every product goes to BLAS as tiles of exactly ``TILE`` rows, the last one filled up with zeros: the
shape is always the same, and a row's bits depend on that row and the weight alone (provided that BLAS treats the rows
of one tile alike, which tests check). Decode pays for at most one partly filled tile, long prefills pay up to a third
of BLAS's best speed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

TILE = 16  # rows; whole micro-tiles of every x86 and ARM kernel of OpenBLAS


def project(x: Float32, weight: Float32, out: Float32) -> None:
    """Write x·weight to ``out``.

    Args:
        x: [rows, in], C-contiguous.
        weight: [in, out]; either memory order, C order being faster for few rows.
        out: [rows, out], C-contiguous.
    """
    rows, width = x.shape
    whole = rows - rows % TILE
    if whole:
        np.matmul(x[:whole].reshape(-1, TILE, width), weight, out=out[:whole].reshape(-1, TILE, out.shape[1]))
    if whole < rows:
        tile = np.zeros((TILE, width), np.float32)
        tile[: rows - whole] = x[whole:]
        out[whole:] = np.matmul(tile, weight)[: rows - whole]
