"""A pure read and a pure copy of device memory: what memory-bound kernels are measured against."""

from __future__ import annotations

from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource

PIECE_BYTES = 16384  # per bulk copy of a read
_FILES = ("stream.cu", "memory.cuh", "hopper.cuh")

READ = KernelSource(
    name="stream_read",
    language="cuda",
    files=_FILES,
    parameters=("pointer", "int32", "int32"),
    entry="stream_read",
    config=(("PIECE", PIECE_BYTES),),
)
COPY = KernelSource(
    name="stream_copy",
    language="cuda",
    files=_FILES,
    parameters=("pointer", "pointer", "int64"),
    entry="stream_copy",
    config=(("PIECE", PIECE_BYTES),),
)


def sources() -> list[KernelSource]:
    """Both kernels; sizes are arguments."""
    return [READ, COPY]


class StreamRead:
    """Reads memory with ``warps`` warps per CTA, each with a ring of ``stages`` pieces in shared memory.

    The best of a few (warps, stages) is the ceiling on a number of SMs.
    """

    def __init__(self, loader: KernelLoader, *, warps: int = 4, stages: int = 3) -> None:
        self._warps, self._stages = warps, stages
        self._kernel = loader.cuda(READ.name, shared_bytes=warps * stages * (PIECE_BYTES + 8))

    def launch(self, memory: int, size: int, *, sms: int, stream: int) -> None:
        """Read ``size`` bytes, rounded down to whole pieces, from the 16-byte aligned address ``memory``."""
        self._kernel.launch(memory, size // PIECE_BYTES, self._stages, grid=sms, block=32 * self._warps, stream=stream)


class StreamCopy:
    """Copies memory on the whole GPU, a 16-byte vector per thread and ``threads`` threads per CTA.

    Of all shapes tried on an H200 this is the fastest, 4.29 TB/s read and written: what is under way at a time stands
    close together in memory. More vectors per thread, persistent CTAs and rings of bulk copies reach 3.6 to 4.1.
    """

    def __init__(self, loader: KernelLoader, *, threads: int = 256) -> None:
        self._threads = threads
        self._kernel = loader.cuda(COPY.name)

    def launch(self, source: int, target: int, size: int, *, stream: int, pdl: bool = False) -> None:
        """Copy ``size`` bytes, rounded down to whole vectors, between 16-byte aligned addresses."""
        vectors = size // 16
        grid = max(1, -(-vectors // self._threads))
        self._kernel.launch(source, target, vectors, grid=grid, block=self._threads, stream=stream, pdl=pdl)
