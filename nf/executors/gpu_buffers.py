"""What the GPU executor keeps in device memory beside weights and KV pages, laid out before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from nf.config import ModelConfig
from nf.errors import PlanError
from nf.executors.array_layout import ArrayLayout
from nf.graphs.plan import PipelinePlan
from nf.kernels.decode_attention import DecodeShape
from nf.kernels.device import DeviceMemory
from nf.kernels.moe import TILE_ROWS, MoeShape
from nf.kernels.prefill_attention import PLAN_HEADER_BYTES, TILE_BYTES

BF16 = np.dtype(ml_dtypes.bfloat16)
COUNT_STRIDE = 256  # bytes from one nano-batch's num_expert_rows to the next's
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Most of everything that a step can have."""

    dense_batch_size: int
    max_num_seqs: int
    max_model_len: int
    page_size: int

    @property
    def tokens_stride(self) -> int:
        """Tokens of a row of the token buffer: one more than the longest sequence, for the surplus token of a step
        that was launched before the end of a sequence was known."""
        return self.max_model_len + 1

    @property
    def logit_rows(self) -> int:
        """Rows of logits there is room for: of every sampled token, and enough at a time for those of prompts, because
        each time reads the whole lm_head."""
        return max(self.max_num_seqs, 64)


def ranges_of(plan: PipelinePlan, operation: str) -> tuple[Range, ...]:
    """Token ranges that the plan cuts an operation into, in order."""
    items = (item for stream in plan.streams for item in stream.nano_operations if item.operation == operation)
    return tuple(sorted(plan.nano_batches[item.nano_batch] for item in items))


@dataclass(frozen=True, slots=True)
class MoeRange:
    """A nano-batch of the expert products: its place among them, the first of its rows in their buffers, and how many
    there may be."""

    index: int
    first_row: int
    max_rows: int


def moe_ranges(plan: PipelinePlan, shape: MoeShape) -> dict[Range, MoeRange]:
    """Rows of the expert buffers for each range of the expert products.

    Raises:
        PlanError: the plan cuts the two products differently; rows sorted for one cannot serve the other.
    """
    ranges = ranges_of(plan, "moe_gate_up_proj")
    if ranges != ranges_of(plan, "moe_down_proj"):
        raise PlanError("streams", "moe_gate_up_proj and moe_down_proj must have the same nano-batches on a GPU")
    found: dict[Range, MoeRange] = {}
    first = 0
    for index, (start, stop) in enumerate(ranges):
        found[start, stop] = MoeRange(index, first, shape.max_rows(stop - start))
        first += found[start, stop].max_rows
    return found


def buffer_layout(config: ModelConfig, sizes: Sizes, plans: Sequence[PipelinePlan], sms: int) -> ArrayLayout:
    """The buffers of a model that any of ``plans`` runs on a GPU of ``sms`` multiprocessors."""
    tokens, seqs = sizes.dense_batch_size, sizes.max_num_seqs
    hidden, inner = config.hidden_size, config.intermediate_size
    arrays: list[tuple[str, DTypeLike, tuple[int, ...]]] = [
        ("hidden", BF16, (tokens, hidden)),
        ("normed", BF16, (tokens, hidden)),
        ("qkv", BF16, (tokens, config.qkv_size)),  # queries are rotated in place
        ("attn", BF16, (tokens, config.num_heads * config.head_dim)),
        ("kv_rows", np.int32, (tokens,)),
        ("rotary", np.float32, (sizes.tokens_stride, config.head_dim // 2, 2)),
        ("tokens", np.int32, (seqs, sizes.tokens_stride)),
        ("logit_rows", BF16, (sizes.logit_rows, hidden)),  # the normed rows that logits are made of
        ("logits", np.float32, (sizes.logit_rows, config.vocab_size)),
        ("row_list", np.int32, (sizes.logit_rows,)),  # for logits outside a step
        ("row_count", np.int32, (1,)),
    ]
    workspace = decode_shape(config, sizes.page_size).workspace_bytes(sms)
    decodes = max(len(ranges_of(plan, "decode_attention")) for plan in plans)
    arrays += [(f"decode_plan_{index}", np.uint8, (workspace,)) for index in range(decodes)]
    prefill_bytes = PLAN_HEADER_BYTES + TILE_BYTES * (tokens + seqs)  # a tile has a token at least
    prefills = max(len(ranges_of(plan, "prefill_attention")) for plan in plans)
    arrays += [(f"prefill_plan_{index}", np.uint8, (prefill_bytes,)) for index in range(prefills)]
    if not config.num_experts:
        return ArrayLayout([*arrays, ("activated", BF16, (tokens, inner))])
    shape = moe_shape(config)
    rows = max(sum(part.max_rows for part in moe_ranges(plan, shape).values()) for plan in plans)
    counts = max(len(moe_ranges(plan, shape)) for plan in plans)
    return ArrayLayout(
        [
            *arrays,
            ("experts", np.int32, (tokens, config.experts_per_token)),
            ("shares", np.float32, (tokens, config.experts_per_token)),
            ("places", np.int32, (tokens, config.experts_per_token)),
            ("permuted", BF16, (rows, hidden)),
            ("activated", BF16, (rows, inner)),
            ("expert_down", BF16, (rows, hidden)),
            ("tile_experts", np.int32, (rows // TILE_ROWS,)),
            ("num_expert_rows", np.uint8, (counts, COUNT_STRIDE)),
        ]
    )


def decode_shape(config: ModelConfig, page_size: int) -> DecodeShape:
    return DecodeShape(config.num_heads, config.num_kv_heads, config.head_dim, page_size, config.sliding_window)


def moe_shape(config: ModelConfig) -> MoeShape:
    return MoeShape(config.hidden_size, config.num_experts, config.experts_per_token)


class Buffers:
    """Device memory for a layout, zeroed; ``buffers[name]`` is the pointer to an array.

    Raises:
        DeviceMemoryError: the GPU has not as much memory free.
    """

    def __init__(self, layout: ArrayLayout) -> None:
        self.memory = DeviceMemory(layout.num_bytes, "activations and logits").zero()
        self.offsets = layout.offsets
        self._pointers = layout.pointers(self.memory.pointer)

    def __getitem__(self, name: str) -> int:
        return self._pointers[name]

    def free(self) -> None:
        """Give the memory back; idempotent."""
        self.memory.free()
