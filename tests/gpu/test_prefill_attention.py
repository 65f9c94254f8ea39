"""Prefill attention against float32 attention over the dense sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from paged_cache import swizzled

from nf.errors import InputError
from nf.kernels.load import KernelLoader
from nf.kernels.prefill_attention import PrefillAttention, sources
from nf.kernels.registry import artifacts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

RELATIVE_ERROR = 4e-3  # of a norm: weights and outputs are rounded to bf16 (2^-9)
NAN = float("nan")


@dataclass
class Case:
    """A step on the device: ``decodes`` rows to be left alone, then (cached, new) tokens of each prefill sequence.

    Everything the kernel must not use is NaN: keys past each sequence's end, other pages, the output.
    """

    chunks: list[tuple[int, int]]
    head_dim: int = 128
    num_kv_heads: int = 2
    group: int = 4
    page_size: int = 16
    window: int | None = None
    decodes: int = 0
    extra_columns: int = 64  # of q's rows, beyond the queries
    seed: int = 0
    dense: list[tuple[Any, Any]] = field(default_factory=list)  # K, V of each sequence, [keys, num_kv_heads, head_dim]

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, device="cuda", generator=generator).bfloat16()

        lengths = [(9, 1)] * self.decodes + self.chunks
        self.num_heads = self.num_kv_heads * self.group
        pages = [-(-(cached + new) // self.page_size) for cached, new in lengths]
        order = torch.randperm(sum(pages) + 3, device="cuda", generator=generator).int()  # three pages of nobody
        self.kv_indptr = _int32([sum(pages[:i]) for i in range(len(pages) + 1)])
        self.kv_indices = order[: sum(pages)].contiguous()
        self.qo_indptr = _int32([sum(new for _, new in lengths[:i]) for i in range(len(lengths) + 1)])
        self.kv_lens = _int32([cached + new for cached, new in lengths])
        self.counts = _int32([self.decodes, len(lengths)])
        self.rows = int(self.qo_indptr[-1])
        self.q = normal(max(self.rows, 1), self.num_heads * self.head_dim + self.extra_columns)
        heads = (self.num_kv_heads, 2, self.page_size, self.head_dim)
        cache = torch.full((len(order), *heads), NAN, device="cuda", dtype=torch.bfloat16)
        for i, (cached, new) in enumerate(lengths):
            kv = normal(2, cached + new, self.num_kv_heads, self.head_dim)
            self.dense.append((kv[0], kv[1]))
            padded = torch.full((2, pages[i] * self.page_size, *kv.shape[2:]), NAN, device="cuda", dtype=kv.dtype)
            padded[:, : cached + new] = kv
            own = self.kv_indices[int(self.kv_indptr[i]) : int(self.kv_indptr[i + 1])].long()
            cache[own] = padded.view(2, pages[i], self.page_size, *kv.shape[2:]).permute(1, 3, 0, 2, 4)
        self.cache = swizzled(cache).contiguous()

    def attention(self) -> PrefillAttention:
        return PrefillAttention(
            KernelLoader(artifacts(sources(), "sm_90a")),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            window=self.window,
        )

    def poisoned_out(self) -> Any:
        shape = (max(self.rows, 1), self.num_heads * self.head_dim)
        return torch.full(shape, NAN, device="cuda", dtype=torch.bfloat16)

    def run(self, start: int = 0, stop: int | None = None, *, sms: int = 132, launches: int = 1) -> Any:
        """Output of rows [start, stop) of the step, everything else NaN; of the last of several launches."""
        kernel, stop = self.attention(), self.rows if stop is None else stop
        plan = _poisoned_bytes(kernel.plan_bytes(stop - start, len(self.dense)))
        self.plan(kernel, plan, start, stop)
        for _ in range(launches):
            out = self.poisoned_out()
            self.attend(kernel, plan, out, sms)
        torch.cuda.synchronize()
        return out

    def plan(self, kernel: PrefillAttention, plan: Any, start: int, stop: int, *, pdl: bool = False) -> None:
        kernel.plan(
            self.qo_indptr.data_ptr(),
            self.kv_lens.data_ptr(),
            self.kv_indptr.data_ptr(),
            self.counts.data_ptr(),
            self.counts.data_ptr() + 4,
            plan.data_ptr(),
            start=start,
            stop=stop,
            stream=torch.cuda.current_stream().cuda_stream,
            pdl=pdl,
        )

    def attend(self, kernel: PrefillAttention, plan: Any, out: Any, sms: int = 132, *, pdl: bool = False) -> None:
        kernel.launch(
            self.q.data_ptr(),
            self.cache.data_ptr(),
            out.data_ptr(),
            plan.data_ptr(),
            self.kv_indices.data_ptr(),
            q_stride=self.q.stride(0),
            sms=sms,
            stream=torch.cuda.current_stream().cuda_stream,
            pdl=pdl,
        )

    def reference(self) -> Any:
        """Float32 output of every prefill row; NaN where the kernel must not write."""
        out = self.poisoned_out().float()
        row = self.decodes
        for (cached, new), (k, v) in zip(self.chunks, self.dense[self.decodes :], strict=True):
            q = self.q[row : row + new, : self.num_heads * self.head_dim].float()
            q = q.view(new, self.num_kv_heads, self.group, self.head_dim)
            scores = torch.einsum("tngd,knd->ngtk", q, k.float()) * self.head_dim**-0.5
            position = torch.arange(cached, cached + new, device="cuda")[:, None]
            key = torch.arange(cached + new, device="cuda")[None]
            hidden = key > position
            if self.window is not None:
                hidden |= key <= position - self.window
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            out[row : row + new] = torch.einsum("ngtk,knd->tngd", weights, v.float()).reshape(new, -1)
            row += new
        return out


def _int32(values: list[int]) -> Any:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _poisoned_bytes(count: int) -> Any:
    return torch.full((count,), 0xAB, dtype=torch.uint8, device="cuda")


def check(out: Any, expected: Any) -> None:
    """``out`` is NaN where ``expected`` is, and close to it elsewhere: in all, and in every row of a head."""
    assert torch.equal(out.isnan(), expected.isnan())
    error, size = (out.float() - expected).nan_to_num(), expected.nan_to_num()
    assert error.norm() <= RELATIVE_ERROR * size.norm()
    error, size = (x.unflatten(1, (-1, 64)).norm(dim=-1) for x in (error, size))
    assert (error <= 4 * RELATIVE_ERROR * size + 1e-6).all()


RAGGED = [(0, 1), (0, 33), (5, 127), (0, 128), (3, 129), (300, 65), (127, 1), (1000, 333), (128, 32), (0, 700)]


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ragged_chunks(head_dim: int, page_size: int) -> None:
    case = Case(RAGGED, head_dim=head_dim, page_size=page_size, decodes=3, seed=page_size + head_dim)
    check(case.run(), case.reference())


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_group_size(head_dim: int, group: int) -> None:
    case = Case([(70, 200), (0, 129), (511, 2)], head_dim=head_dim, group=group, num_kv_heads=3, seed=group)
    check(case.run(), case.reference())


@pytest.mark.parametrize("window", [1, 7, 64, 128, 200, 5000])
def test_window(window: int) -> None:
    case = Case([(0, 300), (900, 150), (130, 5)], window=window, group=5, seed=window)
    check(case.run(), case.reference())


@pytest.mark.parametrize(("start", "stop"), [(0, 260), (260, 261), (261, 500), (200, 901), (0, 3), (901, 901)])
def test_range_cuts_chunks(start: int, stop: int) -> None:
    case = Case([(40, 400), (0, 300), (77, 198)], decodes=3)
    expected = case.reference()
    expected[:start], expected[stop:] = NAN, NAN
    check(case.run(start, stop), expected)


def test_keys_of_later_rows_may_be_missing() -> None:
    """Rows before a nano-batch's end must not touch keys that the next nano-batch has yet to append."""
    case = Case([(100, 150)], head_dim=128)
    expected = case.reference()
    expected[75:] = NAN
    for position in range(100 + 75, 250):
        page = int(case.kv_indices[position // case.page_size])
        case.cache[page, :, :, :, position % case.page_size] = NAN
    check(case.run(0, 75), expected)


def test_without_prefill_rows_nothing_is_written() -> None:
    case = Case([], decodes=5)
    assert case.run().isnan().all()
    assert Case([]).run().isnan().all()


@pytest.mark.parametrize("sms", [2, 7, 132])
def test_many_short_sequences_and_repeated_launches(sms: int) -> None:
    chunks = [(i * 7 % 50, 1 + i % 5) for i in range(300)]
    case = Case(chunks, num_kv_heads=8, decodes=11)
    out = case.run(sms=sms, launches=3)
    check(out, case.reference())
    assert torch.equal(out.nan_to_num(), case.run(sms=64).nan_to_num())  # bits do not depend on who computes what


def test_large_scores() -> None:
    """Maxima that rise late and far, so that earlier sums and outputs are rescaled."""
    case = Case([(0, 600)], seed=5)
    case.q *= 6.0
    check(case.run(), case.reference())


def test_captured_once_serves_other_steps() -> None:
    case, other = Case([(200, 300), (0, 77)], seed=1), Case([(0, 150), (31, 100)], seed=2)
    kernel, expected = case.attention(), other.reference()
    plan, out = _poisoned_bytes(kernel.plan_bytes(case.rows, 8)), case.poisoned_out()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.plan(kernel, plan, 0, case.rows)
        case.attend(kernel, plan, out, pdl=True)
        case.attend(kernel, plan, out, pdl=True)
    graph.replay()
    check(out, case.reference())
    for name in ("q", "cache", "qo_indptr", "kv_lens", "kv_indptr", "kv_indices", "counts"):
        target, source = getattr(case, name), getattr(other, name)
        target.view(-1)[: source.numel()] = source.reshape(-1)
    out.fill_(NAN)
    graph.replay()
    check(out[: other.rows], expected)
    assert out[other.rows :].isnan().all()


@pytest.mark.parametrize(
    ("field", "value"), [("head_dim", 96), ("page_size", 8), ("num_heads", 18), ("window", 0), ("scale", -1.0)]
)
def test_shapes_without_a_kernel(field: str, value: Any) -> None:
    shape: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 16, field: value}
    with pytest.raises(InputError, match=field):
        PrefillAttention([], **shape)
