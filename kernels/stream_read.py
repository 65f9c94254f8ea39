"""A pure read of device memory by bulk copies: what memory-bound kernels are measured against."""

from __future__ import annotations

from nf.kernels.compile import Artifact
from nf.kernels.load import CudaKernel
from nf.kernels.source import KernelSource

PIECE_BYTES = 16384  # per copy


def sources() -> list[KernelSource]:
    return [
        KernelSource(
            name="stream_read",
            language="cuda",
            files=("stream_read.cu", "hopper.cuh"),
            parameters=("pointer", "int32", "int32"),
            entry="stream_read",
            config=(("PIECE", PIECE_BYTES),),
        )
    ]


class StreamRead:
    """Reads memory with ``warps`` warps per CTA, each with a ring of ``stages`` pieces in shared memory.

    The best of a few (warps, stages) is the ceiling on a number of SMs:
    """

    def __init__(self, artifact: Artifact, *, warps: int = 4, stages: int = 3) -> None:
        self._warps, self._stages = warps, stages
        self._kernel = CudaKernel(artifact, shared_bytes=warps * stages * (PIECE_BYTES + 8))

    def __call__(self, memory: int, size: int, *, sms: int, stream: int) -> None:
        """Read ``size`` bytes, rounded down to whole pieces, from the 16-byte aligned address ``memory``."""
        self._kernel(memory, size // PIECE_BYTES, self._stages, grid=sms, block=32 * self._warps, stream=stream)
