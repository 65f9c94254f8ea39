"""GEMM in every shipped configuration against float64: epilogues, output types, odd sizes, few and no rows.

Memory and races: ``compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_gemm.py -k "128x128 or swapped"``,
likewise with ``--tool racecheck``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from nf.kernels.gemm import (
    GROUPED,
    GROUPED_EPILOGUES,
    Epilogue,
    Gemm,
    GemmChoice,
    GemmConfig,
    GemmKernels,
    Output,
    configurations,
    sources,
)
from nf.kernels.load import KernelLoader
from nf.kernels.registry import artifacts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

NORM_ERROR = {"bfloat16": 4e-3, "float32": 1e-4}  # of the whole output, relative
ROUNDING = {"bfloat16": 2**-8, "float32": 1e-4}  # of one output, relative
SMALL = 2e-3  # of one output, absolute: cancellation
NAN = float("nan")
PAST = 3  # rows behind the capacity that nothing may touch

SHAPES = [  # capacity, rows there are, n, k, SMs
    (300, 257, 784, 4096, 132),
    (40, 33, 1280, 1032, 132),
    (256, 1, 4096, 576, 20),
    (128, 0, 512, 512, 132),
    (512, 512, 1024, 512, 68),
    (1024, 999, 2560, 1000, 132),
]
ENDINGS: list[tuple[Epilogue, Output]] = [
    ("none", "bfloat16"),
    ("bias", "bfloat16"),
    ("residual", "bfloat16"),
    ("swiglu", "bfloat16"),
    ("none", "float32"),
]
CASES = [
    pytest.param(config, epilogue, output, id=f"{config.label}-{epilogue}-{output}")
    for config in configurations()
    for epilogue, output in ENDINGS
    if config.serves(epilogue, output)
]


@pytest.fixture(scope="module")
def kernels() -> GemmKernels:
    return GemmKernels(KernelLoader(artifacts(sources(), "sm_90a")))


def normal(*size: int, scale: float = 1.0) -> Any:
    return (torch.randn(size, device="cuda") * scale).bfloat16()


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


@dataclass
class Product:
    """Random operands, a poisoned output with rows behind its capacity, and the product in float64."""

    capacity: int
    n: int
    k: int
    epilogue: Epilogue
    output: Output

    def __post_init__(self) -> None:
        self.x = normal(self.capacity, self.k)
        self.w = normal(self.n, self.k, scale=self.k**-0.5)
        self.extra = normal(self.n) if self.epilogue == "bias" else normal(self.capacity, self.n)
        columns = self.n // 2 if self.epilogue == "swiglu" else self.n
        dtype = getattr(torch, self.output)
        self.whole = torch.full((self.capacity + PAST, columns), NAN, device="cuda", dtype=dtype)
        self.y = self.whole[: self.capacity]
        self.count = torch.zeros(1, dtype=torch.int32, device="cuda")

    def launch(self, gemm: Gemm, rows: int, **changes: int) -> None:
        self.count.fill_(rows)
        pointers = {
            "x": self.x.data_ptr(),
            "w": self.w.data_ptr(),
            "y": self.y.data_ptr(),
            "extra": self.extra.data_ptr(),
            "rows": self.count.data_ptr(),
        }
        gemm.launch(**(pointers | changes), stream=stream())

    def expected(self) -> Any:
        result = self.x.double() @ self.w.double().T
        if self.epilogue in ("bias", "residual"):
            result = result + self.extra.double()
        if self.epilogue == "swiglu":
            pairs = result.view(self.capacity, -1, 2, 8)  # 8 gate rows of W, 8 up rows, …
            gate, up = pairs[:, :, 0], pairs[:, :, 1]
            result = (gate / (1 + torch.exp(-gate)) * up).reshape(self.capacity, -1)
        return result

    def check(self, rows: int) -> None:
        wanted, got = self.expected()[:rows], self.y[:rows].double()
        if rows:
            assert float((got - wanted).norm() / wanted.norm()) < NORM_ERROR[self.output]
        assert bool(((got - wanted).abs() <= ROUNDING[self.output] * wanted.abs() + SMALL).all())
        assert bool(self.whole[self.capacity :].isnan().all()), "rows behind the capacity were written"


@pytest.mark.parametrize(("config", "epilogue", "output"), CASES)
def test_matches_float64(kernels: GemmKernels, config: GemmConfig, epilogue: Epilogue, output: Output) -> None:
    for capacity, rows, n, k, sms in SHAPES:
        product = Product(capacity, n, k, epilogue, output)
        choice = GemmChoice(config)
        gemm = kernels.product(n, k, capacity, sms=sms, epilogue=epilogue, output=output, choice=choice)
        product.launch(gemm, rows)
        product.check(rows)
        if config.swap or rows == 0:
            assert bool(product.y[rows:].isnan().all())


@pytest.mark.parametrize("config", configurations(), ids=lambda config: config.label)
def test_same_result_every_time_and_on_any_number_of_sms(kernels: GemmKernels, config: GemmConfig) -> None:
    product = Product(640, 1536, 2048, "none", "bfloat16")
    gemm = kernels.product(1536, 2048, 640, sms=132, choice=GemmChoice(config))
    product.launch(gemm, 640)
    first = product.y.clone()
    product.check(640)
    for sms in (132, 100, 24, 8):
        product.y.fill_(NAN)
        product.launch(gemm, 640, sms=sms)
        assert torch.equal(product.y, first)


@pytest.mark.parametrize(
    "config", [config for config in configurations() if config.serves("residual")], ids=lambda config: config.label
)
def test_same_in_a_crowd(kernels: GemmKernels, config: GemmConfig, crowd: Callable[[], None]) -> None:
    """What is read of a stage, of a residual or a peer's sums, must have arrived before the next copy there is begun:
    soon, since the operands of a tile take few stages."""
    rows, n, k = 2048, 4096, 512
    product = Product(rows, n, k, "residual", "bfloat16")
    gemm = kernels.product(n, k, rows, sms=132, epilogue="residual", choice=GemmChoice(config))
    product.launch(gemm, rows)
    product.check(rows)
    first, differing = product.y.clone(), torch.zeros(1, dtype=torch.int64, device="cuda")
    for _ in range(50):
        crowd()
        product.launch(gemm, rows)
        differing += (product.y != first).sum()
    assert differing.item() == 0


def test_more_rows_than_the_capacity_change_nothing(kernels: GemmKernels) -> None:
    for config in configurations():
        product = Product(96, 512, 512, "none", "bfloat16")
        product.launch(kernels.product(512, 512, 96, sms=132, choice=GemmChoice(config)), 1 << 20)
        product.check(96)


@pytest.mark.parametrize("capacity", [8, 300, 1024])
def test_residual_in_place(kernels: GemmKernels, capacity: int) -> None:
    product = Product(capacity, 4096, 1024, "residual", "bfloat16")
    product.y.copy_(product.extra)
    gemm = kernels.product(4096, 1024, capacity, sms=132, epilogue="residual")
    product.launch(gemm, capacity, extra=product.y.data_ptr())
    product.check(capacity)


@pytest.mark.parametrize("capacity", [16, 64, 256, 700])
def test_captured_once_it_serves_any_number_of_rows(kernels: GemmKernels, capacity: int) -> None:
    product = Product(capacity, 2560, 8192, "none", "bfloat16")
    gemm = kernels.product(2560, 8192, capacity, sms=132)
    product.launch(gemm, capacity)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm.launch(
            x=product.x.data_ptr(),
            w=product.w.data_ptr(),
            y=product.y.data_ptr(),
            rows=product.count.data_ptr(),
            stream=stream(),
        )
    for rows in (capacity, 1, capacity // 2, 0):
        product.y.fill_(NAN)
        product.count.fill_(rows)
        graph.replay()
        product.check(rows)


@pytest.mark.parametrize("rows", [3, 64, 256, 1024])
def test_each_kernel_waits_for_the_one_before(kernels: GemmKernels, rows: int) -> None:
    """A chain in which every product reads the last one's output, launched without a pause."""
    width, links = 1024, 24
    # Orthogonal, so that values keep their size; row-major, which the factors of torch's QR are not.
    factors = [torch.linalg.qr(torch.randn(width, width, device="cuda"))[0] for _ in range(links)]
    weights = [factor.contiguous().bfloat16() for factor in factors]
    gemm = kernels.product(width, width, rows, sms=132)
    count = torch.full((1,), rows, dtype=torch.int32, device="cuda")
    start = normal(rows, width)
    buffers = [torch.empty_like(start) for _ in range(2)]
    wanted = start
    for w in weights:
        wanted = (wanted.double() @ w.double().T).bfloat16()
    for _ in range(3):
        x = start
        for i, w in enumerate(weights):
            y = buffers[i % 2]
            gemm.launch(x=x.data_ptr(), w=w.data_ptr(), y=y.data_ptr(), rows=count.data_ptr(), stream=stream())
            x = y
        error = (x.double() - wanted.double()).norm() / wanted.double().norm()
        assert float(error) < NORM_ERROR["bfloat16"] * links**0.5


@pytest.mark.parametrize("config", GROUPED, ids=lambda config: config.label)
@pytest.mark.parametrize("epilogue", GROUPED_EPILOGUES)
def test_rows_of_several_experts(kernels: GemmKernels, config: GemmConfig, epilogue: Epilogue) -> None:
    experts, n, k = 4, 1552, 1032
    owners = [0, 0, 1, 3, 3]  # of each 128 rows; expert 2 has none
    product = Product(128 * 7, n, k, epilogue, "bfloat16")
    weights = normal(experts, n, k, scale=k**-0.5)
    tile_experts = torch.tensor([*owners, 0, 0], dtype=torch.int32, device="cuda")
    gemm = kernels.product(n, k, 128 * 7, sms=132, epilogue=epilogue, num_experts=experts, choice=GemmChoice(config))
    product.launch(gemm, 128 * 5, w=weights.data_ptr(), tile_experts=tile_experts.data_ptr())
    got = product.y.clone()
    assert bool(got[128 * 5 :].isnan().all())
    for tile, owner in enumerate(owners):
        product.w = weights[owner]
        rows = slice(128 * tile, 128 * tile + 128)
        wanted = product.expected()[rows]
        assert float((got[rows].double() - wanted).norm() / wanted.norm()) < NORM_ERROR["bfloat16"]
