"""How kernels that take a row of activations per CTA spread over the GPU."""

from __future__ import annotations

import functools

from nf.errors import InputError
from nf.kernels.load import device_sms

MAX_HIDDEN_SIZE = 16384
_VECTOR = 8  # bf16 values of a 16-byte access
_VECTORS_PER_THREAD = 4  # VECTORS of norm.cu and gather.cu
_THREADS_PER_SM = 1536  # as many as registers allow norm.cu and gather.cu, but for norm.cu with ADD


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


def ctas_per_sm(threads: int) -> int:
    """CTAs of ``threads`` threads that fit on a multiprocessor."""
    return _THREADS_PER_SM // threads


@functools.cache
def grid_on(sms: int, ctas: int, per_sm: int) -> int:
    """CTAs to launch on ``sms`` multiprocessors where there is work for ``ctas``; at least one.

    On a part of the GPU ``per_sm`` each, which take further work a grid apart. On all of it one for each piece of work:
    the hardware hands them out in order of address as SMs become free, and memory likes that order.
    """
    return max(1, ctas if sms >= device_sms() else min(ctas, sms * per_sm))
