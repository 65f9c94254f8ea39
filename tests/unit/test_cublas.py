"""The reference of the GEMMs, on doubles of cuBLAS and of arrays."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from nf.bench import cublas


class Array:
    """As much of a cupy array as a call looks at."""

    def __init__(self, pointer: int, rows: int, columns: int) -> None:
        self.shape, self.dtype, self.data = (rows, columns), "uint16", SimpleNamespace(ptr=pointer)


def test_a_call_keeps_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory given back to the pool is soon somebody else's, whom the reference's output would overwrite."""
    given: list[tuple[Any, ...]] = []
    library = SimpleNamespace(
        cublasSetStream_v2=lambda _handle, stream: given.append(("stream", stream.value)),
        cublasGemmEx=lambda _handle, *rest: given.append(tuple(getattr(one, "value", None) for one in rest)) or 0,
    )
    monkeypatch.setattr(cublas, "_cublas", lambda: (library, None))
    arrays = [Array(16, 3, 64), Array(32, 128, 64), Array(48, 3, 128)]
    alive = [weakref.ref(array) for array in arrays]
    call = cublas.gemm(*arrays)
    del arrays
    gc.collect()
    assert all(reference() for reference in alive)
    call(7)
    assert given[0] == ("stream", 7)
    assert [value for value in given[1] if value in (16, 32, 48)] == [32, 16, 48]  # w, x, y
    del call
    gc.collect()
    assert not any(reference() for reference in alive)
