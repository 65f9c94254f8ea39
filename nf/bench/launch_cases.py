"""Host time of one launch of each kernel, beside the driver's part: on a stream, and as the engine launches, into a
graph that is being captured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from nf.bench import decode_attention_cases, memory_cases, moe_cases, prefill_attention_cases, sampling_cases
from nf.bench.gemm_cases import MODELS, Products
from nf.bench.kernels import Bench, Row
from nf.bench.measure import Call, Measurement
from nf.kernels import stream

LIMIT = 5e-6  # seconds
LAUNCHES = 100  # in a row: fewer than the driver queues before it makes the host wait
ROUNDS = 100  # spread over seconds
ROWS = 16  # tokens


def rows(bench: Bench) -> Iterator[Row]:
    import cupy

    on = cupy.cuda.Stream(non_blocking=True)
    calls = list(_calls(bench))
    launches: list[Callable[[], object]] = [_relaunch(bench, on)]
    launches += [partial(call, on.ptr) for _, _, call in calls]
    for suffix, captured in (("", False), (", captured", True)):
        driver, *others = host_seconds(launches, on, captured=captured)
        for (name, kernels, _), of_call in zip(calls, others, strict=True):
            seconds = of_call / kernels
            yield Row(
                "launch",
                name + suffix,
                Measurement(seconds, math.nan),
                1,
                "launch",
                "the speed at 5 µs",
                LIMIT / seconds,
                1.0,
                (("the driver's own call", driver / seconds),),
            )


def _calls(bench: Bench) -> Iterator[tuple[str, int, Call]]:
    """(name, kernels that a call launches, call)."""
    products = Products(bench, [MODELS["llama-3-8b"]["o"]])
    yield "gemm", 1, products.each(ROWS, bench.sms)[0]
    yield "decode_attention", 2, decode_attention_cases.call(bench, 32, [128] * ROWS, bench.sms)
    yield "prefill_attention", 1, prefill_attention_cases.call(bench, 1, ROWS, 0)
    yield "norm", 1, memory_cases.norm_call(bench, ROWS, "plain")
    yield "rope_append", 1, memory_cases.rope_call(bench, ROWS, True)
    table = bench.normal(memory_cases.VOCAB, memory_cases.HIDDEN)
    yield "embed", 1, memory_cases.embed_call(bench, table, ROWS, False)
    routed = moe_cases.Routed(bench, ROWS)
    yield "moe route", 1, routed.route
    yield "moe combine", 1, routed.combine
    yield "sampling", 1, sampling_cases.call(bench, "fp32", {}, sampling_cases.random_logits(bench, "fp32", 1.0))


def _relaunch(bench: Bench, on: Any) -> Callable[[], object]:
    """A launch whose arguments and place stand ready: what is left is ctypes and the driver."""
    memory, kernel = bench.normal(1024), bench.loader.cuda(stream.COPY.name)
    kernel.launch(memory.data.ptr, memory.data.ptr, 1, grid=1, block=32, stream=on.ptr)
    return kernel.relaunch


def host_seconds(launches: Sequence[Callable[[], object]], on: Any, *, captured: bool = False) -> list[float]:
    """For each, the least over rounds of the mean time that a launch keeps the host: what else the host does only adds
    to it. All take turns, for what it does comes and goes. The queue is empty at the start of each turn.

    Args:
        on: CuPy's stream that all of them launch on.
        captured: into a graph, which is thrown away.
    """
    import cupy

    cupy.cuda.Device().synchronize()  # the buffers were filled on another stream
    least = [math.inf] * len(launches)
    for _ in range(ROUNDS):
        for index, launch in enumerate(launches):
            if captured:
                on.begin_capture()
            started = time.perf_counter()
            for _ in range(LAUNCHES):
                launch()
            least[index] = min(least[index], (time.perf_counter() - started) / LAUNCHES)
            if captured:
                on.end_capture()
            else:
                on.synchronize()
    return least
