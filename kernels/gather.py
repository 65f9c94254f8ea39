"""Embedding gather: hidden[t] = table[id], id from the batch or from the device-side token buffer.

Shapes (T tokens, V vocab_size, H hidden_size):

- table [V, H] bf16, hidden [T, H] bf16
- tokens int32 [slots, tokens_stride], the token buffer: token of position p of the sequence in slot s at [s, p]
- token_ids, token_slots, positions: int32 [T]. An id ≥ 0 is stored in the token buffer at (slot, position) and used;
  where it is −1 the buffer's own is used
- count [1]: int32, how many tokens there are; those in [start, min(stop, count)) are done

All of these but ``tokens`` are inputs of the step: they are read before the kernel before has ended, and must not be
its output. The rows that logits are made from are gathered by ``RmsNorm(variant="gather")``. Memory-bound: 4·H bytes
per token.
"""

from __future__ import annotations

from nf.kernels.load import KernelLoader
from nf.kernels.rows import ctas_per_sm, grid_on, row_threads, row_vectors
from nf.kernels.source import KernelSource

EMBED = KernelSource(
    name="embed",
    language="cuda",
    files=("gather.cu", "memory.cuh", "hopper.cuh"),
    parameters=(*("pointer",) * 7, *("int32",) * 4),
    entry="embed",
)


def sources() -> list[KernelSource]:
    """One kernel; sizes are arguments."""
    return [EMBED]


class Embed:
    """Launches the embedding gather.

    Args:
        loader: of ``sources()``.
        hidden_size: a multiple of 8, at most 16384.
        tokens_stride: tokens of a row of the token buffer.

    Raises:
        InputError: a hidden size no kernel was made for.
    """

    def __init__(self, loader: KernelLoader, hidden_size: int, tokens_stride: int) -> None:
        self._kernel = loader.cuda(EMBED.name)
        self._vectors = row_vectors(hidden_size)
        self._threads = row_threads(hidden_size)
        self._ctas_per_sm = ctas_per_sm(self._threads)
        self._tokens_stride = tokens_stride

    def launch(
        self,
        *,
        table: int,
        hidden: int,
        tokens: int,
        token_ids: int,
        token_slots: int,
        positions: int,
        count: int,
        start: int,
        stop: int,
        sms: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """Gather the tokens that there are in [start, stop); the others' rows are left alone.

        Args:
            table, hidden, tokens, token_ids, token_slots, positions, count: device pointers to first elements.
            sms: multiprocessors to spread over.
            pdl: start before the kernel before has ended, and wait for it on the device.
        """
        self._kernel.launch(
            table, hidden, tokens, token_ids, token_slots, positions, count, start, stop, self._vectors,
            self._tokens_stride,
            grid=grid_on(sms, stop - start, self._ctas_per_sm), block=self._threads, stream=stream, pdl=pdl,
        )  # fmt: skip
