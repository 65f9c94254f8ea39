"""Mixture of experts at Mixtral-8x7B's shapes: grouped products against dense ones of as many rows, the rest against a
copy of as many bytes. Experts are drawn evenly, so an expert's last tile is half empty on average."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from nf.bench.kernels import Bench, Row, pointers
from nf.bench.measure import Call, Measurement, measure
from nf.kernels import gemm
from nf.kernels.moe import TILE_ROWS, Moe, MoeShape

HIDDEN, INNER, EXPERTS, CHOICES = 4096, 14336, 8, 2
SHAPE = MoeShape(HIDDEN, EXPERTS, CHOICES)
PRODUCTS: tuple[tuple[str, int, int, gemm.Epilogue], ...] = (
    ("gate_up", 2 * INNER, HIDDEN, "swiglu"),
    ("down", HIDDEN, INNER, "none"),
)


def rows(bench: Bench) -> Iterator[Row]:
    for tokens in (1024, 4096):
        for name, width in (("route", 1), ("permute", 1 + CHOICES), ("combine", 2 + CHOICES)):
            work = tokens * HIDDEN * 2 * width
            measured = measure(bench.rotate(partial(_move, bench, tokens, name), work))
            yield _row(f"{name}, {tokens} tokens", measured, work, "copy", work / measured.seconds / bench.copy_rate)
    for name, n, k, epilogue in PRODUCTS:
        grouped = GroupedProduct(bench, n, k, epilogue)
        for tokens in (1024, 4096):
            dense = measure([_dense(bench, n, k, tokens * CHOICES, epilogue)])
            measured = measure([grouped.call(tokens)])
            work = 2 * tokens * CHOICES * n * k
            score = dense.seconds / measured.seconds
            case = f"{name}, {tokens} tokens, 8 experts, top 2"
            yield Row("moe", case, measured, work, "FLOP", "dense, as many rows", score, None)
        measured, work = measure([grouped.call(64)]), EXPERTS * n * k * 2
        rate = work / measured.seconds / bench.read_rate()
        yield _row(f"{name}, 64 tokens, 8 experts, top 2", measured, work, "streaming read", rate)


def _row(case: str, measured: Measurement, work: float, reference: str, score: float) -> Row:
    return Row("moe", case, measured, work, "B", reference, score, None)


class Routed:
    """Tokens that have chosen experts at random, and the arrays around them."""

    def __init__(self, bench: Bench, tokens: int) -> None:
        import cupy

        self.moe, self.sms, self.tokens = Moe(bench.loader, SHAPE), bench.sms, tokens
        self.max_rows = SHAPE.max_rows(tokens)
        self.normed = bench.normal(tokens, HIDDEN)
        self.weight = bench.normal(EXPERTS, HIDDEN, scale=HIDDEN**-0.5)
        self.experts = cupy.random.random((tokens, EXPERTS)).argsort(-1)[:, :CHOICES].astype(cupy.int32)
        self.shares = cupy.full((tokens, CHOICES), 1 / CHOICES, cupy.float32)
        self.rows = bench.normal(self.max_rows, HIDDEN)
        self.places = cupy.zeros((tokens, CHOICES), cupy.int32)
        self.tile_experts = cupy.zeros(self.max_rows // TILE_ROWS, cupy.int32)
        self.num_rows = cupy.zeros(1, cupy.int32)
        self._count = cupy.full(1, tokens, cupy.int32)
        self._normed_at, self._weight_at, self._experts_at, self._shares_at, self._rows_at, self._places_at = pointers(
            self.normed, self.weight, self.experts, self.shares, self.rows, self.places
        )
        self._tile_experts_at, self._num_rows_at, self._count_at = pointers(
            self.tile_experts, self.num_rows, self._count
        )
        stream = cupy.cuda.get_current_stream()
        self.permute(stream.ptr)
        stream.synchronize()

    def route(self, stream: int) -> None:
        self.moe.route(
            normed=self._normed_at, weight=self._weight_at, experts=self._experts_at, shares=self._shares_at,
            num_tokens=self._count_at, start=0, stop=self.tokens, stream=stream, pdl=True,
        )  # fmt: skip

    def permute(self, stream: int) -> None:
        self.moe.permute(
            normed=self._normed_at, experts=self._experts_at, permuted=self._rows_at, places=self._places_at,
            tile_experts=self._tile_experts_at, num_rows=self._num_rows_at, num_tokens=self._count_at,
            start=0, stop=self.tokens, sms=self.sms, stream=stream, pdl=True,
        )  # fmt: skip

    def combine(self, stream: int) -> None:
        self.moe.combine(
            hidden=self._normed_at, down=self._rows_at, places=self._places_at, shares=self._shares_at,
            num_tokens=self._count_at, start=0, stop=self.tokens, sms=self.sms, stream=stream, pdl=True,
        )  # fmt: skip


def _move(bench: Bench, tokens: int, name: str) -> Call:
    call: Call = getattr(Routed(bench, tokens), name)
    return call


class GroupedProduct:
    """A product with every expert's weight, for any number of tokens."""

    def __init__(self, bench: Bench, n: int, k: int, epilogue: gemm.Epilogue) -> None:
        import cupy

        self.bench, self.n, self.k, self.epilogue = bench, n, k, epilogue
        self.weight = cupy.empty((EXPERTS, n, k), cupy.uint16)
        for expert in self.weight:
            expert[...] = bench.normal(n, k, scale=k**-0.5)

    def call(self, tokens: int) -> Call:
        import cupy

        routed = Routed(self.bench, tokens)
        kernels = gemm.GemmKernels(self.bench.loader)
        product = kernels.product(
            self.n, self.k, routed.max_rows, sms=self.bench.sms, epilogue=self.epilogue, num_experts=EXPERTS
        )
        x, y = cupy.zeros((routed.max_rows, self.k), cupy.uint16), cupy.empty((routed.max_rows, self.n), cupy.uint16)
        x[routed.places.ravel()] = self.bench.normal(tokens * CHOICES, self.k)
        cupy.cuda.get_current_stream().synchronize()

        def call(stream: int) -> None:
            product.launch(
                x=x.data.ptr, w=self.weight.data.ptr, y=y.data.ptr, rows=routed.num_rows.data.ptr,
                tile_experts=routed.tile_experts.data.ptr, stream=stream,
            )  # fmt: skip

        return call


def _dense(bench: Bench, n: int, k: int, rows: int, epilogue: gemm.Epilogue) -> Call:
    import cupy

    product = gemm.GemmKernels(bench.loader).product(n, k, rows, sms=bench.sms, epilogue=epilogue)
    x, w, y = bench.normal(rows, k), bench.normal(n, k, scale=k**-0.5), cupy.empty((rows, n), cupy.uint16)
    count = cupy.full(1, rows, cupy.int32)
    cupy.cuda.get_current_stream().synchronize()

    def call(stream: int) -> None:
        product.launch(x=x.data.ptr, w=w.data.ptr, y=y.data.ptr, rows=count.data.ptr, stream=stream)

    return call
