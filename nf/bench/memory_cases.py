"""Norms, rotation with KV append, and gathers against a streaming copy; shapes of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from nf.bench.kernels import Bench, Row, pointers
from nf.bench.measure import Call, measure
from nf.config import RopeConfig
from nf.kernels import gather, norm, rope_append

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, VOCAB = 4096, 32, 8, 128, 16, 128256
POSITIONS = 8192
FLOOR = 0.85


def rows(bench: Bench) -> Iterator[Row]:
    table = bench.normal(VOCAB, HIDDEN)

    def row(kernel: str, case: str, work: int, make: Callable[[], Call]) -> Row:
        measured = measure(bench.rotate(make, work))
        rate = work / measured.seconds
        beside = (("a copy of that size", rate / bench.copy_rate_of(work)),)
        return Row(kernel, case, measured, work, "B", "streaming copy", rate / bench.copy_rate, FLOOR, beside)

    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    for tokens in (1024, 2048, 8192):
        row_bytes = tokens * HIDDEN * 2
        yield row("norm", f"{tokens} tokens", 2 * row_bytes, partial(norm_call, bench, tokens, "plain"))
        yield row("norm", f"{tokens} tokens, add", 4 * row_bytes, partial(norm_call, bench, tokens, "add"))
        for what in ("decodes", "a prompt"):
            make = partial(rope_call, bench, tokens, what == "decodes")
            yield row("rope_append", f"{tokens} tokens, 32/8 heads, {what}", tokens * width * 4, make)
        for what in ("decodes", "prompts"):
            make = partial(embed_call, bench, table, tokens, what == "decodes")
            yield row("gather", f"embed, {tokens} tokens, {what}", 2 * row_bytes, make)
    gathered = partial(norm_call, bench, 1024, "gather", 4096)
    yield row("gather", "1024 of 4096 rows, normed", 1024 * HIDDEN * 4, gathered)


def _count(tokens: int) -> Any:
    import cupy

    return cupy.full(1, tokens, cupy.int32)


def norm_call(bench: Bench, tokens: int, variant: norm.Variant, of: int | None = None) -> Call:
    import cupy

    sms, kernel = bench.sms, norm.RmsNorm(bench.loader, HIDDEN, 1e-5, variant)
    hidden, delta, weight = bench.normal(of or tokens, HIDDEN), bench.normal(tokens, HIDDEN), bench.normal(HIDDEN)
    normed, count = cupy.empty((tokens, HIDDEN), cupy.uint16), _count(tokens)
    listed = cupy.random.permutation(of or tokens)[:tokens].astype(cupy.int32)

    arrays = hidden, weight, normed, count, delta, listed
    hidden_at, weight_at, normed_at, count_at, delta_at, listed_at = pointers(*arrays)

    def call(stream: int, _keep: Any = arrays) -> None:
        kernel.launch(
            hidden=hidden_at, weight=weight_at, normed=normed_at, count=count_at, delta=delta_at, rows=listed_at,
            start=0, stop=tokens, sms=sms, stream=stream, pdl=True,
        )  # fmt: skip

    return call


def rope_call(bench: Bench, tokens: int, decodes: bool) -> Call:
    """Decodes at random positions, each in a page of its own, or tokens that follow one another."""
    import cupy

    from nf.executors.rope import rotary_table

    shape = rope_append.RopeShape(HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
    sms, kernel = bench.sms, rope_append.RopeAppend(bench.loader, shape)
    qkv = bench.normal(tokens, shape.qkv_size)
    kv = cupy.zeros((tokens, KV_HEADS, 2 * HEAD_DIM * PAGE_SIZE), cupy.uint16)
    table = cupy.asarray(rope_append.rotary_pairs(*rotary_table(RopeConfig(), HEAD_DIM, POSITIONS)))
    if decodes:
        positions = cupy.random.randint(0, POSITIONS, tokens).astype(cupy.int32)
        pages = cupy.random.permutation(tokens)
    else:
        positions = cupy.arange(tokens, dtype=cupy.int32)
        pages = cupy.random.permutation(tokens // PAGE_SIZE).repeat(PAGE_SIZE)
    places = (pages * PAGE_SIZE + positions % PAGE_SIZE).astype(cupy.int32)
    count = _count(tokens)

    arrays = qkv, kv, table, places, positions, count
    qkv_at, kv_at, table_at, places_at, positions_at, count_at = pointers(*arrays)

    def call(stream: int, _keep: Any = arrays) -> None:
        kernel.launch(
            qkv=qkv_at, kv=kv_at, table=table_at, rows=places_at, positions=positions_at, count=count_at,
            start=0, stop=tokens, sms=sms, stream=stream, pdl=True,
        )  # fmt: skip

    return call


def embed_call(bench: Bench, table: Any, tokens: int, decodes: bool) -> Call:
    """Decodes, whose ids are in the token buffer, or prompts, whose ids are given."""
    import cupy

    sms, kernel = bench.sms, gather.Embed(bench.loader, HIDDEN, POSITIONS)
    hidden = cupy.empty((tokens, HIDDEN), cupy.uint16)
    buffer = cupy.asarray(np.random.default_rng(0).integers(0, VOCAB, (256, POSITIONS)).astype(np.int32))
    ids = cupy.full(tokens, -1, cupy.int32) if decodes else cupy.random.randint(0, VOCAB, tokens).astype(cupy.int32)
    slots = (cupy.arange(tokens) % 256).astype(cupy.int32)
    positions, count = cupy.random.permutation(POSITIONS)[:tokens].astype(cupy.int32), _count(tokens)

    arrays = table, hidden, buffer, ids, slots, positions, count
    table_at, hidden_at, buffer_at, ids_at, slots_at, positions_at, count_at = pointers(*arrays)

    def call(stream: int, _keep: Any = arrays) -> None:
        kernel.launch(
            table=table_at, hidden=hidden_at, tokens=buffer_at, token_ids=ids_at, token_slots=slots_at,
            positions=positions_at, count=count_at, start=0, stop=tokens, sms=sms, stream=stream, pdl=True,
        )  # fmt: skip

    return call
