"""Decode attention against a pure streaming read of as many bytes on as many SMs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nf.bench import gemm_cases
from nf.bench.kernels import Bench, Row, pointers
from nf.bench.measure import Call, measure
from nf.kernels.decode_attention import DecodeAttention, DecodeShape

HEAD_DIM, PAGE_SIZE, KV_HEADS = 128, 16, 8


def rows(bench: Bench) -> Iterator[Row]:
    even = [1280] * 512
    for heads in (32, 64):
        yield _row(bench, f"512 × 1280, {heads}/8 heads", heads, even, bench.sms, 0.88)
    yield _row(bench, "512 ShareGPT-like lengths, 32/8 heads", 32, sharegpt_like(512), bench.sms, 0.80)
    yield _row(bench, "1 × 32 k, 32/8 heads", 32, [32768], bench.sms, 0.75)
    for sms in (16, 24, 32):
        yield _row(bench, f"512 × 1280, 32/8 heads, {sms} SMs", 32, even, sms, 0.85)


def sharegpt_like(count: int) -> list[int]:
    """Context lengths of decoding requests: log-normal prompts and outputs with ShareGPT's mean and deviation (246 and
    547 in, 322 and 244 out; NanoFlow, table 4), each caught at a random point of its output. Seeded."""
    rng = np.random.default_rng(0)

    def lengths(mean: float, deviation: float) -> Any:
        variance = np.log1p((deviation / mean) ** 2)
        return rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)

    tokens = lengths(246, 547) + lengths(322, 244) * rng.random(count)
    return [int(n) for n in np.clip(tokens, 1, 4000)]


def _row(bench: Bench, case: str, heads: int, kv_lens: list[int], sms: int, floor: float) -> Row:
    work = sum(kv_lens) * KV_HEADS * HEAD_DIM * 2 * 2  # K and V, bf16
    on = None if sms == bench.sms else gemm_cases.partition_stream(sms)
    measured = measure(bench.rotate(lambda: call(bench, heads, kv_lens, sms), work), on=on)
    reference = f"streaming read on {'' if on is None else 'a partition of '}{sms} SMs"
    score = work / measured.seconds / bench.read_rate(sms, on)
    return Row("decode_attention", case, measured, work, "B", reference, score, floor)


def call(bench: Bench, heads: int, kv_lens: list[int], sms: int) -> Call:
    """Attention of one layer over pages in random order, planned beforehand as a step plans it for all its layers."""
    import cupy

    shape = DecodeShape(heads, KV_HEADS, HEAD_DIM, PAGE_SIZE)
    attention = DecodeAttention(bench.loader, shape, sms=bench.sms)
    pages = -(-np.array(kv_lens) // PAGE_SIZE)
    columns = (heads + 2 * KV_HEADS) * HEAD_DIM
    q = bench.normal(len(kv_lens), columns)
    kv = bench.normal(int(pages.sum()), KV_HEADS, 2 * HEAD_DIM * PAGE_SIZE)
    out = cupy.empty((len(kv_lens), heads * HEAD_DIM), cupy.uint16)
    workspace = cupy.empty(shape.workspace_bytes(bench.sms), cupy.uint8)
    lens = cupy.array(kv_lens, cupy.int32)
    indptr = cupy.array(np.concatenate([[0], np.cumsum(pages)]), cupy.int32)
    indices = cupy.random.permutation(int(pages.sum())).astype(cupy.int32)
    count = cupy.array([len(kv_lens)], cupy.int32)
    table = {"kv_lens": lens.data.ptr, "kv_indptr": indptr.data.ptr}
    stream = cupy.cuda.get_current_stream()
    attention.plan(
        **table, num_decode=count.data.ptr, workspace=workspace.data.ptr,
        start=0, stop=len(kv_lens), sms=sms, stream=stream.ptr,
    )  # fmt: skip
    stream.synchronize()

    arrays = q, kv, out, workspace, lens, indptr, indices, count
    q_at, kv_at, out_at, workspace_at, lens_at, indptr_at, indices_at, _ = pointers(*arrays)

    def launch(stream: int, _keep: Any = arrays) -> None:
        attention.launch(
            q=q_at, q_stride=columns, kv=kv_at, out=out_at, kv_lens=lens_at, kv_indptr=indptr_at,
            kv_indices=indices_at, workspace=workspace_at, sms=sms, stream=stream, pdl=True,
        )  # fmt: skip

    return launch
