"""What a model declares: the operations of one layer, what they read and write, and the weights they use.

Nothing here computes. An executor runs the operations, a pipeline plan says in which order and on which part
of the dense batch, and the dependencies between them are derived from the reads and writes below.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Resource(StrEnum):
    """The hardware resource that bounds an operation (NanoFlow, arXiv 2408.12757, section 3)."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Rows(StrEnum):
    """Which rows of the dense batch an operation touches; decode and prefill rows are disjoint."""

    ALL = "all"
    DECODE = "decode"
    PREFILL = "prefill"

    def meets(self, other: Rows) -> bool:
        """Whether some row can belong to both."""
        return self is other or Rows.ALL in (self, other)


PER_LAYER_BUFFERS = frozenset({"kv"})
"""Buffers of which every layer has its own; all others are reused by the next layer, row by row."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a layer, over rows (tokens) of the dense batch.

    Args:
        name: from the project's vocabulary, unique in the layer: ``qkv_proj``, ``decode_attention``, …
        resource: what bounds it.
        reads: buffers of which it reads its own rows.
        writes: buffers of which it writes its own rows.
        reads_before: buffers of which it also reads the rows *before* its own, because an earlier nano-batch may
            hold earlier tokens of the same request (a prefill chunk cut by a nano-batch boundary).
        rows: the kind of rows it touches.
        weights: names of the layer's weights it uses.
    """

    name: str
    resource: Resource
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    reads_before: tuple[str, ...] = ()
    rows: Rows = Rows.ALL
    weights: tuple[str, ...] = ()
