"""Prefill attention against the rates it should reach; only the products below the diagonal are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nf.bench.kernels import Bench, Row, pointers
from nf.bench.measure import Call, measure
from nf.kernels.prefill_attention import PrefillAttention

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16


def rows(bench: Bench) -> Iterator[Row]:
    yield _row(bench, "8 × 4096 new, 32/8 heads, causal", 8, 4096, 0, 550e12)
    yield _row(bench, "8 × 1024 new on 3072 cached, 32/8 heads", 8, 1024, 3072, 450e12)
    yield _row(bench, "1 × 1024 new on 3072 cached, 32/8 heads", 1, 1024, 3072, 450e12)


def _row(bench: Bench, case: str, count: int, new: int, cached: int, target: float) -> Row:
    keys = count * (new * cached + new * (new + 1) // 2)  # (token, key) pairs
    work = 4 * HEADS * HEAD_DIM * keys
    measured = measure([call(bench, count, new, cached)])
    score = work / measured.seconds / target
    return Row("prefill_attention", case, measured, work, "FLOP", f"{target / 1e12:.0f} TFLOP/s", score, 1.0)


def call(bench: Bench, count: int, new: int, cached: int) -> Call:
    """Attention of one layer, planned beforehand as a step plans it for all its layers."""
    import cupy

    attention = PrefillAttention(
        bench.loader,
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE_SIZE,
    )  # fmt: skip
    tokens, pages = count * new, (new + cached) // PAGE_SIZE
    columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    q = bench.normal(tokens, columns)
    kv = bench.normal(count * pages, KV_HEADS, 2 * HEAD_DIM * PAGE_SIZE)
    out = cupy.empty((tokens, HEADS * HEAD_DIM), cupy.uint16)
    plan = cupy.empty(attention.plan_bytes(tokens, count), cupy.uint8)
    qo_indptr = cupy.array(np.arange(count + 1) * new, cupy.int32)
    kv_indptr = cupy.array(np.arange(count + 1) * pages, cupy.int32)
    kv_lens = cupy.full(count, new + cached, cupy.int32)
    indices = cupy.random.permutation(count * pages).astype(cupy.int32)
    num_decode, num_seqs = cupy.zeros(1, cupy.int32), cupy.full(1, count, cupy.int32)
    stream = cupy.cuda.get_current_stream()
    attention.plan(
        qo_indptr.data.ptr, kv_lens.data.ptr, kv_indptr.data.ptr, num_decode.data.ptr, num_seqs.data.ptr,
        plan.data.ptr, start=0, stop=tokens, stream=stream.ptr,
    )  # fmt: skip
    stream.synchronize()

    arrays, sms = (q, kv, out, plan, indices), bench.sms
    q_at, kv_at, out_at, plan_at, indices_at = pointers(*arrays)

    def launch(stream: int, _keep: Any = arrays) -> None:
        attention.launch(q_at, kv_at, out_at, plan_at, indices_at, q_stride=columns, sms=sms, stream=stream, pdl=True)

    return launch
