"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of bf16 rows, fp32 arithmetic: x / √(mean x² + eps) · weight.

Shapes (T tokens, H hidden_size; bf16):

- hidden [T, H], normed [T, H] or, gathered, [R, H]; weight [H]
- delta [T, H], "add" only: hidden += delta comes first, rounded to bf16, and the norm is of the rounded sum
- rows [R], "gather" only: int32, normed[i] is the norm of hidden[rows[i]] (the rows whose logits are wanted)
- count [1]: int32, how many rows there are; those in [start, min(stop, count)) are done

``count`` and ``rows`` are inputs of the step: they are read before the kernel before has ended, and must not be its
output. One CTA takes a row at a time and reads it once. Memory-bound: 4·H bytes per row (8·H with "add").
"""

from __future__ import annotations

import functools
from typing import Literal

from nf.kernels.load import KernelLoader
from nf.kernels.rows import ctas_per_sm, grid_on, row_threads, row_vectors
from nf.kernels.source import KernelSource, ParameterKind

Variant = Literal["plain", "add", "gather"]
VARIANTS: tuple[Variant, ...] = ("plain", "add", "gather")

_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 6, *("int32",) * 3, "float32")


def sources() -> list[KernelSource]:
    """One kernel per variant; the hidden size is an argument."""
    return [norm_source(variant) for variant in VARIANTS]


def norm_source(variant: Variant) -> KernelSource:
    return KernelSource(
        name=f"rms_norm_{variant}",
        language="cuda",
        files=("norm.cu", "memory.cuh", "hopper.cuh"),
        parameters=_PARAMETERS,
        entry="rms_norm",
        config=(("ADD", variant == "add"), ("GATHER", variant == "gather")),
    )


class RmsNorm:
    """Launches RMSNorm of rows of one size.

    Args:
        loader: of ``sources()``, at least of this variant's.
        hidden_size: a multiple of 8, at most 16384.
        eps: added to the mean square.
        variant: see the module.

    Raises:
        InputError: a hidden size no kernel was made for.
    """

    def __init__(self, loader: KernelLoader, hidden_size: int, eps: float, variant: Variant = "plain") -> None:
        self._vectors = row_vectors(hidden_size)
        self._kernel = loader.cuda(norm_source(variant).name, shared_bytes=16 * self._vectors)
        self._threads = row_threads(hidden_size)
        self._eps = eps

    def launch(
        self,
        *,
        hidden: int,
        weight: int,
        normed: int,
        count: int,
        start: int,
        stop: int,
        sms: int,
        stream: int,
        delta: int = 0,
        rows: int = 0,
        pdl: bool = False,
    ) -> None:
        """Norm the rows that there are in [start, stop).

        Args:
            hidden, weight, normed, count, delta, rows: device pointers to the arrays' first elements.
            sms: multiprocessors to spread over.
            pdl: start before the kernel before has ended, and wait for it on the device.
        """
        self._kernel.launch(
            hidden, delta, weight, normed, rows, count, start, stop, self._vectors, self._eps,
            grid=_grid(stop - start, self._threads, sms), block=self._threads, stream=stream, pdl=pdl,
        )  # fmt: skip


@functools.cache
def _grid(rows: int, threads: int, sms: int) -> int:
    """Two rows for each CTA that fits are better taken by these, whose weight is there already."""
    fit = ctas_per_sm(threads)
    return max(1, min(rows, sms * fit)) if rows <= 2 * sms * fit else grid_on(sms, rows, fit)
