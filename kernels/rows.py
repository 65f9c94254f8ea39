"""How kernels that take a row of activations per CTA spread over the GPU."""

from __future__ import annotations

from nf.errors import InputError

MAX_HIDDEN_SIZE = 16384
_VECTOR = 8  # bf16 values of a 16-byte access
_VECTORS_PER_THREAD = 4  # VECTORS of norm.cu and gather.cu
_THREADS_PER_SM = 1536  # as many as their registers allow


def row_vectors(hidden_size: int) -> int:
    """16-byte vectors of a row.

    Raises:
        InputError: no multiple of 8, or larger than 16384.
    """
    if hidden_size % _VECTOR or not 0 < hidden_size <= MAX_HIDDEN_SIZE:
        raise InputError("hidden_size", f"must be a multiple of 8 and at most {MAX_HIDDEN_SIZE}, not {hidden_size}")
    return hidden_size // _VECTOR


def row_threads(hidden_size: int) -> int:
    """Threads of a CTA: whole warps, each thread with up to four vectors."""
    return 32 * -(-row_vectors(hidden_size) // (32 * _VECTORS_PER_THREAD))


def row_grid(rows: int, threads: int, sms: int) -> int:
    """CTAs for ``rows`` rows on ``sms`` multiprocessors; each takes rows a grid apart."""
    return max(1, min(rows, sms * (_THREADS_PER_SM // threads)))
