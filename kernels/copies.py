"""Small copies at the start of a step: whole KV pages, and starts of token-buffer rows. Batch says when they are due.

- ``PageCopy``: pairs int32 [P, 2] (source page, destination page), copied in all layers. No destination is a source of
  the same launch. Source and destination caches may be the same, or either may be pinned host memory that the device
  can address: then the same kernel swaps.
- ``RowForks``: forks int32 [F, 3] (source slot, destination slot, length): the first ``length`` tokens of a row of the
  token buffer. No destination is a source of the same launch.

How many there are is read from device memory, so a captured launch serves every step; a step without any costs one
empty launch.
"""

from __future__ import annotations

from nf.errors import InputError
from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource

_THREADS = 256  # THREADS of copies.cu
_FILES = ("copies.cu", "memory.cuh", "hopper.cuh")

COPY_PAGES = KernelSource(
    name="copy_pages",
    language="cuda",
    files=_FILES,
    parameters=(*("pointer",) * 4, *("int32",) * 2, *("int64",) * 2),
    entry="copy_pages",
)
FORK_ROWS = KernelSource(
    name="fork_rows", language="cuda", files=_FILES, parameters=(*("pointer",) * 3, "int32"), entry="fork_rows"
)


def sources() -> list[KernelSource]:
    """Both kernels; sizes are arguments."""
    return [COPY_PAGES, FORK_ROWS]


class PageCopy:
    """Launches copies of whole pages.

    Args:
        loader: of ``sources()``.
        layers: of the model.
        page_bytes: K and V of a page of one layer, a multiple of 16.

    Raises:
        InputError: pages that are not whole vectors.
    """

    def __init__(self, loader: KernelLoader, *, layers: int, page_bytes: int) -> None:
        if page_bytes % 16 or page_bytes <= 0:
            raise InputError("page_bytes", f"must be a positive multiple of 16, not {page_bytes}")
        self._kernel = loader.cuda(COPY_PAGES.name)
        self._layers = layers
        self._vectors = page_bytes // 16

    def launch(
        self,
        *,
        source: int,
        destination: int,
        pairs: int,
        count: int,
        source_stride: int,
        destination_stride: int,
        sms: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """Copy the pages of the first ``count`` pairs.

        Args:
            source, destination: pointers to page 0 of layer 0.
            pairs, count: device pointers.
            source_stride, destination_stride: bytes from a layer's page 0 to the next layer's.
            sms: multiprocessors to spread over.
            pdl: start before the kernel before has ended, and wait for it on the device.
        """
        self._kernel.launch(
            source, destination, pairs, count, self._layers, self._vectors, source_stride, destination_stride,
            grid=4 * sms, block=_THREADS, stream=stream, pdl=pdl,
        )  # fmt: skip


class RowForks:
    """Launches copies of the starts of token-buffer rows.

    Args:
        loader: of ``sources()``.
        tokens_stride: tokens of a row of the token buffer.
    """

    def __init__(self, loader: KernelLoader, tokens_stride: int) -> None:
        self._kernel = loader.cuda(FORK_ROWS.name)
        self._tokens_stride = tokens_stride

    def launch(self, *, tokens: int, forks: int, count: int, sms: int, stream: int, pdl: bool = False) -> None:
        """Do the first ``count`` forks; all pointers are to device memory."""
        self._kernel.launch(
            tokens, forks, count, self._tokens_stride, grid=sms, block=_THREADS, stream=stream, pdl=pdl
        )  # fmt: skip
