"""Loads to measure plans under: dense batches that are full, with a given share of decode tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nf.bench.steady_step import Load
from nf.errors import InputError
from nf.planning.nano_layer import BatchShape

SHRINK = 0.9
MOST_KEYS = 1 << 20  # that a decode token may see


@dataclass(frozen=True, slots=True)
class DecodeShare:
    """How much of a step decodes.

    Args:
        share: of its tokens, above 0, as near as whole tokens allow; with 1 no prompt is left to be read.
        keys: that each of these tokens sees on average; None: as follows from the lengths of requests.

    Raises:
        InputError: out of range.
    """

    share: float
    keys: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError("decode_shares", f"must be above 0 and at most 1, got {self.share:g}")
        if self.keys is not None and not 1 <= self.keys <= MOST_KEYS:
            raise InputError("decode_shares", f"keys must be from 1 to {MOST_KEYS}, got {self.keys}")


def loads(
    dense_batch_size: int,
    input_len: int,
    output_len: int,
    decode_shares: Sequence[DecodeShare] = (),
    kv_tokens: int | None = None,
) -> list[Load]:
    """One load of these lengths, or one per decode share: with as many tokens in and out together or, where that has a
    number of keys, as many as make it so.

    Args:
        kv_tokens: that the KV cache holds; with more decode tokens requests get shorter, as no more would be running
            otherwise. None: no bound.

    Raises:
        InputError: a share or a length is out of range.
    """
    if dense_batch_size < 2:
        raise InputError("dense_batch_size", f"must be at least 2, got {dense_batch_size}")
    for name, length in (("input_len", input_len), ("output_len", output_len)):
        if length < 1:
            raise InputError(name, f"must be at least 1, got {length}")
    if not decode_shares:
        return [fitting(Load(dense_batch_size, input_len, output_len), kv_tokens)]
    return [fitting(_mixed(dense_batch_size, input_len, output_len, share), kv_tokens) for share in decode_shares]


def _mixed(dense_batch_size: int, input_len: int, output_len: int, wanted: DecodeShare) -> Load:
    prompt, decodes = input_len, output_len - 1
    if wanted.share < 1:
        decodes = max(1, round(wanted.share * (input_len + output_len)))
        prompt = max(1, input_len + output_len - decodes)
    if wanted.keys is not None:
        scale = wanted.keys / (prompt + decodes / 2)
        prompt, decodes = max(1, round(prompt * scale)), max(1, round(decodes * scale))
    return Load(dense_batch_size, prompt, decodes + 1, decode_only=wanted.share == 1)


def fitting(load: Load, kv_tokens: int | None) -> Load:
    """The load, with its requests shortened in proportion until the KV cache holds them."""
    while kv_tokens is not None and load.kv_tokens > kv_tokens and load.input_len > 1 and load.output_len > 2:
        input_len, output_len = max(1, int(load.input_len * SHRINK)), max(2, int(load.output_len * SHRINK))
        load = replace(load, input_len=input_len, output_len=output_len)
    return load


def made_for(load: Load) -> tuple[int, int]:
    """The load as a plan names it: decode tokens, and the mean number of keys that each of them sees."""
    return load.num_decode, max(1, batch_shape(load).decode_context)


def batch_shape(load: Load) -> BatchShape:
    """A load as the planner sees it: how many rows of each kind, at which contexts on average."""
    decodes, lens = load.num_decode, load.kv_lens()
    chunks = load.chunks()
    prefill = load.dense_batch_size - decodes
    seen = math.fsum(new * (start + new / 2) for start, new in chunks)
    return BatchShape(
        load.dense_batch_size,
        decodes,
        round(sum(lens[:decodes]) / decodes) if decodes else 0,
        round(seen / prefill) if prefill else 0,
    )
