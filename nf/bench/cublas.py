"""cuBLAS as the reference for GEMMs: y = x·Wᵀ, bf16 in and out, fp32 accumulation."""

from __future__ import annotations

from typing import Any

import numpy as np

from nf.bench.measure import Call

_BF16, _COMPUTE_32F, _DEFAULT_ALGORITHM = 14, 68, -1  # CUDA_R_16BF, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


def gemm(x: Any, w: Any, y: Any) -> Call:
    """A call computing ``y [m, n] = x [m, k]·w [n, k]ᵀ`` on bf16 arrays (cupy uint16)."""
    import cupy
    from cupy_backends.cuda.libs import cublas

    (m, k), n = x.shape, w.shape[0]
    handle = cupy.cuda.Device().cublas_handle

    def call(stream: int) -> None:
        cublas.setStream(handle, stream)
        # Column-major: yᵀ [n, m] = w·xᵀ.
        cublas.gemmEx(
            handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, n, m, k, _ONE.ctypes.data, w.data.ptr, _BF16, k,
            x.data.ptr, _BF16, k, _ZERO.ctypes.data, y.data.ptr, _BF16, n, _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip

    return call
