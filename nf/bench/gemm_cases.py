"""GEMMs of Llama-3's layers and of its logits against cuBLAS on the same SMs; epilogues against the plain product; few
rows against a streaming read of the weights.

A card draws more as it warms up, so the reference is measured before and after.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from nf.bench import cublas
from nf.bench.kernels import Bench, Row, pointers
from nf.bench.measure import Call, Measurement, measure
from nf.kernels.gemm import Epilogue, Gemm, GemmKernels, Output

Shape = tuple[int, int]  # n, k

MODELS: dict[str, dict[str, Shape]] = {
    "llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-3-70b-tp4": {"qkv": (2560, 8192), "o": (8192, 2048), "gate_up": (14336, 8192), "down": (8192, 7168)},
}
HEADS: dict[str, Shape] = {"llama-3-8b": (128256, 4096), "llama-3-70b-tp4": (32064, 8192)}  # logits, in fp32
HEAD_ROWS = (256, 1024)
ROWS = (256, 512, 768, 1024, 1536, 2048, 4096, 8192)
PARTITIONS, PARTITION_ROWS = (116, 100, 68), (512, 2048)
EPILOGUES: tuple[tuple[str, Epilogue], ...] = (
    ("qkv", "bias"), ("o", "residual"), ("gate_up", "swiglu"), ("down", "residual"),
)  # fmt: skip
SKINNY_ROWS = (1, 16, 32)
AGAIN_SECONDS = 0.15  # warming up on a card that is warm


def rows(bench: Bench) -> Iterator[Row]:
    for model, shapes in MODELS.items():
        products = Products(bench, list(shapes.values()))
        for count in ROWS:
            yield products.row(f"{model} layer, {count} rows", count, bench.sms, 1 / 1.03)
        for sms in PARTITIONS:
            for count in PARTITION_ROWS:
                yield products.row(f"{model} layer, {count} rows, {sms} SMs", count, sms, 1.0)
        for count in SKINNY_ROWS:
            measured = measure([products.ours(count, bench.sms)])
            score = products.bytes / measured.seconds / bench.read_rate()
            case = f"{model} layer, {count} row{'s' * (count > 1)}"
            yield Row("gemm", case, measured, products.bytes, "B", "streaming read", score, 0.85)
    head = Products(bench, [HEADS["llama-3-8b"]], "float32")
    for count in HEAD_ROWS:
        yield head.row(f"llama-3-8b logits in fp32, {count} rows", count, bench.sms, None)
    for name, epilogue in EPILOGUES:
        yield _epilogue(bench, name, MODELS["llama-3-8b"][name], epilogue)


class Products:
    """The GEMMs of a layer, one after the other, with weights of their own: more than L2 holds."""

    def __init__(self, bench: Bench, shapes: list[Shape], output: Output = "bfloat16") -> None:
        self.bench, self.shapes, self.output = bench, shapes, output
        self.kernels = GemmKernels(bench.loader)
        self.weights = [bench.normal(n, k, scale=k**-0.5) for n, k in shapes]
        self.bytes = sum(n * k * 2 for n, k in shapes)

    def row(self, case: str, count: int, sms: int, floor: float | None) -> Row:
        stream = None if sms == self.bench.sms else partition_stream(sms)
        reference, measured = _both(self.cublas(count), self.ours(count, sms), stream)
        return _row(case, measured, count * self.bytes, "cuBLAS", reference, floor)

    def ours(self, count: int, sms: int) -> Call:
        return functools.partial(_all, self.each(count, sms))

    def each(self, count: int, sms: int) -> list[Call]:
        """A call of each product."""
        return [
            _call(self.bench, self.kernels.product(n, k, count, sms=sms, output=self.output), w, self.empty(count, n))
            for (n, k), w in zip(self.shapes, self.weights, strict=True)
        ]

    def cublas(self, count: int) -> Call:
        return functools.partial(
            _all,
            [
                cublas.gemm(self.bench.normal(count, k), w, self.empty(count, n))
                for (n, k), w in zip(self.shapes, self.weights, strict=True)
            ],
        )

    def empty(self, rows: int, columns: int) -> Any:
        import cupy

        return cupy.empty((rows, columns), cupy.float32 if self.output == "float32" else cupy.uint16)


def _both(reference: Call, ours: Call, on: int | None = None) -> tuple[Measurement, Measurement]:
    before = measure([reference], on=on)
    measured = measure([ours], on=on)
    after = measure([reference], warm=AGAIN_SECONDS, on=on)
    mean = Measurement((before.seconds + after.seconds) / 2, (before.joules + after.joules) / 2)
    return mean, measured


def _row(case: str, measured: Measurement, work: float, name: str, reference: Measurement, floor: float | None) -> Row:
    beside = ((f"{name} in joules", reference.joules / measured.joules),)
    return Row("gemm", case, measured, work, "FLOP", name, reference.seconds / measured.seconds, floor, beside)


def _all(calls: list[Call], stream: int) -> None:
    for call in calls:
        call(stream)


def _call(bench: Bench, product: Gemm, w: Any, y: Any, extra: Any = None) -> Call:
    """A call of ``product`` on random rows; ``extra`` None is y, a residual that is updated in place."""
    import cupy

    x = bench.normal(product.capacity, product.k)
    extra = y if extra is None else extra
    count = cupy.array([product.capacity], cupy.int32)
    arrays = x, w, y, count, extra
    x_at, w_at, y_at, count_at, extra_at = pointers(*arrays)

    def call(stream: int, _keep: Any = arrays) -> None:
        product.launch(x=x_at, w=w_at, y=y_at, rows=count_at, extra=extra_at, stream=stream)

    return call


@functools.cache
def partition_stream(sms: int) -> int:
    """A stream on a partition of so many SMs."""
    from nf.graphs.partition import required_partitions

    return required_partitions((sms,))[0].stream()


def _epilogue(bench: Bench, name: str, shape: Shape, epilogue: Epilogue, count: int = 2048) -> Row:
    """The same product with and without an epilogue, each in the configuration chosen for it."""
    n, k = shape
    kernels = GemmKernels(bench.loader)
    w = bench.normal(n, k, scale=k**-0.5)
    y, bias = bench.normal(count, n), bench.normal(n)
    fused = kernels.product(n, k, count, sms=bench.sms, epilogue=epilogue)
    plain = kernels.product(n, k, count, sms=bench.sms)
    extra = bias if epilogue == "bias" else None
    reference, measured = _both(_call(bench, plain, w, y), _call(bench, fused, w, y, extra))
    case = f"llama-3-8b {name}, {count} rows, {epilogue}"
    return _row(case, measured, 2 * count * n * k, "the plain product", reference, 1 / 1.02)
