"""Rows of a product do not depend on how many there are, what the others hold, or where in a tile they stand."""

from __future__ import annotations

import numpy as np
import pytest

from nf.executors.cpu_gemm import TILE, Projection, project


@pytest.mark.parametrize(
    ("inner", "outer"), [(1, 1), (7, 3), (24, 40), (24, 200), (256, 1536), (768, 333), (1500, 33), (1500, 512)]
)
def test_bits_of_a_row_are_its_own(inner: int, outer: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3 * TILE, inner)).astype(np.float32)
    matrix = rng.standard_normal((outer, inner)).astype(np.float32)
    weight = Projection.of(matrix)
    assert weight.outputs == outer
    alone = np.empty((len(x), outer), np.float32)
    for i in range(len(x)):
        project(x[i : i + 1], weight, alone[i : i + 1])
    np.testing.assert_allclose(alone, x.astype(np.float64) @ matrix.T, rtol=0, atol=1e-3)
    for count in (2, 3, TILE - 1, TILE, TILE + 1, 2 * TILE + 5, 3 * TILE):
        for start in (0, len(x) - count):
            out = np.empty((count, outer), np.float32)
            project(x[start : start + count], weight, out)
            np.testing.assert_array_equal(out, alone[start : start + count])


def test_no_rows() -> None:
    project(np.empty((0, 4), np.float32), Projection.of(np.ones((2, 4), np.float32)), np.empty((0, 2), np.float32))
