"""cuBLAS as the reference for GEMMs: y = x·Wᵀ, bf16 in and out, fp32 accumulation."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from nf.bench.measure import Call

_TRANSPOSED, _PLAIN = 1, 0  # CUBLAS_OP_T, CUBLAS_OP_N
_BF16, _FP32 = 14, 0  # CUDA_R_16BF, CUDA_R_32F
_COMPUTE_32F, _DEFAULT_ALGORITHM = 68, -1  # CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)


def gemm(x: Any, w: Any, y: Any) -> Call:
    """A call computing ``y [m, n] = x [m, k]·w [n, k]ᵀ`` on bf16 arrays (cupy uint16); y may be float32.

    Through ctypes, since cupy's own binding refuses to be captured.
    """
    library, handle = _cublas()
    (m, k), n = x.shape, w.shape[0]
    output = _FP32 if y.dtype == "float32" else _BF16
    pointers = [ctypes.c_void_p(array.data.ptr) for array in (w, x, y)]

    def call(stream: int, _keep: Any = (x, w, y)) -> None:
        library.cublasSetStream_v2(handle, ctypes.c_void_p(stream))
        # Column-major: yᵀ [n, m] = w·xᵀ.
        status = library.cublasGemmEx(
            handle, _TRANSPOSED, _PLAIN, n, m, k, ctypes.byref(_ONE), pointers[0], _BF16, k, pointers[1], _BF16, k,
            ctypes.byref(_ZERO), pointers[2], output, n, _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip
        if status:
            raise RuntimeError(f"cuBLAS answered status {status}")

    return call


def version() -> int:
    """E.g. 130000 for 13.0.0."""
    library, handle = _cublas()
    found = ctypes.c_int()
    library.cublasGetVersion_v2(handle, ctypes.byref(found))
    return found.value


@functools.cache
def _cublas() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """The library that cupy has loaded, and its handle of the current device."""
    import cupy

    handle = ctypes.c_void_p(cupy.cuda.Device().cublas_handle)
    return ctypes.CDLL("libcublas.so.13"), handle
