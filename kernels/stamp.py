"""Time stamps: what the GPU's clock shows when a stream comes to them, for graphs whose replays are timed."""

from __future__ import annotations

from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource

STAMP_BYTES = 8  # nanoseconds, uint64

STAMP = KernelSource(name="stamp", language="cuda", files=("stamp.cu",), parameters=("pointer",), entry="stamp")


def sources() -> list[KernelSource]:
    """One kernel."""
    return [STAMP]


class Stamp:
    """Launches a stamp: one warp, on one multiprocessor of those that the stream has."""

    def __init__(self, loader: KernelLoader) -> None:
        self._kernel = loader.cuda(STAMP.name)

    def launch(self, out: int, *, stream: int) -> None:
        """Write STAMP_BYTES at the device pointer ``out``; all streams of a GPU read one clock."""
        self._kernel.launch(out, grid=1, block=32, stream=stream)
