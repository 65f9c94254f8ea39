"""RMSNorm against float64, on poisoned outputs."""

from __future__ import annotations

from typing import Any

import pytest

from nf.errors import InputError
from nf.kernels.load import KernelLoader
from nf.kernels.norm import VARIANTS, RmsNorm, Variant, sources
from nf.kernels.registry import artifacts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

ROUNDING = 2**-8  # of bf16, and as much again for the arithmetic before it
EPS = 1e-5
NAN = float("nan")


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (torch.randn(shape, device="cuda") * scale).bfloat16()


def expected(x: Any, weight: Any) -> Any:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def check(variant: Variant, hidden_size: int, rows: int, count: int, start: int, stop: int, *, sms: int = 132) -> None:
    kernel = RmsNorm(KernelLoader(artifacts(sources(), "sm_90a")), hidden_size, EPS, variant)
    hidden, delta, weight = normal(rows + 3, hidden_size, scale=2.0), normal(rows, hidden_size), normal(hidden_size)
    listed = torch.randint(0, rows + 3, (rows,), device="cuda", dtype=torch.int32)
    normed = torch.full((rows, hidden_size), NAN, device="cuda").bfloat16()
    before, pointer = hidden.clone(), torch.tensor([count], device="cuda", dtype=torch.int32)
    kernel.launch(
        hidden=hidden.data_ptr(), weight=weight.data_ptr(), normed=normed.data_ptr(), delta=delta.data_ptr(),
        rows=listed.data_ptr(), count=pointer.data_ptr(), start=start, stop=stop, sms=sms,
        stream=torch.cuda.current_stream().cuda_stream, pdl=True,
    )  # fmt: skip
    done = slice(start, max(start, min(stop, count)))
    if variant == "add":
        before[done] = (before[done].float() + delta[done].float()).bfloat16()
    assert torch.equal(hidden, before)
    source = hidden[listed.long()] if variant == "gather" else hidden[:rows]
    reference = expected(source[done], weight)
    assert ((normed[done].double() - reference).abs() <= ROUNDING * reference.abs() + 1e-30).all()
    untouched = torch.ones(rows, dtype=torch.bool, device="cuda")
    untouched[done] = False
    assert normed[untouched].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hidden_size", [8, 264, 1000, 1024, 1032, 4096, 5120, 16384])
def test_sizes(variant: Variant, hidden_size: int) -> None:
    check(variant, hidden_size, rows=37, count=37, start=0, stop=37)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("count", "start", "stop"), [(0, 0, 50), (1, 0, 50), (50, 20, 33), (25, 20, 33), (7, 20, 33)])
def test_ranges(variant: Variant, count: int, start: int, stop: int) -> None:
    check(variant, 4096, rows=50, count=count, start=start, stop=stop)


@pytest.mark.parametrize("hidden_size", [256, 4096])
def test_more_rows_than_ctas(hidden_size: int) -> None:
    check("plain", hidden_size, rows=5000, count=4999, start=0, stop=5000)
    check("add", hidden_size, rows=300, count=300, start=0, stop=300, sms=2)


def test_a_size_without_a_kernel() -> None:
    with pytest.raises(InputError, match="hidden_size"):
        RmsNorm(KernelLoader(artifacts(sources(), "sm_90a")), 4100, EPS)
