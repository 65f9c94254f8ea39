"""Decode attention against float64 attention over each sequence's own keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from paged_cache import swizzled

from nf.kernels.decode_attention import FEW_SMS, DecodeAttention, DecodeShape, sources
from nf.kernels.load import KernelLoader
from nf.kernels.registry import artifacts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

RELATIVE_ERROR = 4e-3  # of a row's norm: weights and outputs are rounded to bf16 (2^-9)
NAN = float("nan")


@dataclass
class Case:
    """Decode rows of a step, then ``others`` rows that are not decode rows.

    Everything the kernel must not use is NaN: keys past each sequence's end, other pages, the output, the workspace.
    """

    kv_lens: list[int]
    shape: DecodeShape
    others: int = 0
    seed: int = 0
    scale: float = 1.0  # of the queries: large ones make weights concentrate on few keys

    def __post_init__(self) -> None:
        shape, generator = self.shape, torch.Generator("cuda").manual_seed(self.seed)

        def normal(*size: int) -> Any:
            return torch.randn(size, device="cuda", generator=generator).bfloat16()

        self.rows = len(self.kv_lens)
        pages = [-(-length // shape.page_size) for length in self.kv_lens]
        order = torch.randperm(sum(pages) + 3, device="cuda", generator=generator).int()  # three pages of nobody
        self.indptr = _int32([sum(pages[:i]) for i in range(self.rows + 1)])
        self.indices = order[: sum(pages)].contiguous()
        self.lens = _int32([*self.kv_lens, *[1 << 30] * self.others])
        self.num_decode = _int32([self.rows])
        columns = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.q = normal(self.rows + self.others + 1, columns) * self.scale
        cache = torch.full(
            (len(order), shape.num_kv_heads, 2, shape.page_size, shape.head_dim), NAN, device="cuda"
        ).bfloat16()
        self.dense = []
        for i, length in enumerate(self.kv_lens):
            kv = normal(2, length, shape.num_kv_heads, shape.head_dim)
            self.dense.append(kv)
            padded = torch.full((2, pages[i] * shape.page_size, *kv.shape[2:]), NAN, device="cuda").bfloat16()
            padded[:, :length] = kv
            own = self.indices[sum(pages[:i]) : sum(pages[: i + 1])].long()
            cache[own] = padded.view(2, pages[i], shape.page_size, *kv.shape[2:]).permute(1, 3, 0, 2, 4)
        self.cache = swizzled(cache).contiguous()

    def run(self, start: int = 0, stop: int = 1 << 30, *, sms: int = 132, planned: int = 0, launches: int = 1) -> Any:
        """Output of the last of several launches on ``sms`` SMs, after a plan for ``planned`` (0: as many)."""
        launch = self.planned(start, stop, sms=sms, planned=planned)
        for _ in range(launches):
            out = launch()
        torch.cuda.synchronize()
        return out

    def planned(self, start: int = 0, stop: int = 1 << 30, *, sms: int, planned: int = 0) -> Callable[[], Any]:
        """What launches on ``sms`` SMs, after a plan for ``planned`` (0: as many)."""
        kernel = DecodeAttention(KernelLoader(artifacts(sources(), "sm_90a")), self.shape, sms=132)
        workspace = torch.full((self.shape.workspace_bytes(132),), 0xAB, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        kernel.plan(
            kv_lens=self.lens.data_ptr(),
            kv_indptr=self.indptr.data_ptr(),
            num_decode=self.num_decode.data_ptr(),
            workspace=workspace.data_ptr(),
            start=start,
            stop=stop,
            sms=planned or sms,
            stream=stream,
        )

        def launch() -> Any:
            out = torch.full((len(self.q), self.shape.num_heads * self.shape.head_dim), NAN, device="cuda").bfloat16()
            kernel.launch(
                q=self.q.data_ptr(),
                q_stride=self.q.stride(0),
                kv=self.cache.data_ptr(),
                out=out.data_ptr(),
                kv_lens=self.lens.data_ptr(),
                kv_indptr=self.indptr.data_ptr(),
                kv_indices=self.indices.data_ptr(),
                workspace=workspace.data_ptr(),
                sms=sms,
                stream=stream,
            )
            return out

        return launch

    def expected(self, row: int) -> Any:
        shape = self.shape
        q = self.q[row, : shape.num_heads * shape.head_dim].double()
        q = q.view(shape.num_kv_heads, shape.group, shape.head_dim)
        k, v = self.dense[row][:, -shape.window if shape.window else 0 :].double()
        weights = (torch.einsum("ngd,knd->ngk", q, k) * shape.head_dim**-0.5).softmax(-1)
        return torch.einsum("ngk,knd->ngd", weights, v).flatten()

    def check(self, out: Any, start: int = 0, stop: int = 1 << 30) -> None:
        for row in range(len(self.q)):
            if start <= row < min(stop, self.rows):
                expected = self.expected(row)
                error = (out[row].double() - expected).norm() / expected.norm()
                assert error < RELATIVE_ERROR, (row, self.kv_lens[row])
            else:
                assert out[row].isnan().all(), row


def _int32(values: list[int]) -> Any:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def shape(
    heads: int = 8, kv_heads: int = 2, head_dim: int = 128, page_size: int = 16, window: int | None = None
) -> DecodeShape:
    return DecodeShape(heads, kv_heads, head_dim, page_size, window)


MIXED = [1, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 511, 512, 513, 1280, 1, 700, 2]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("sms", [132, 5])
def test_mixed_lengths(head_dim: int, page_size: int, sms: int) -> None:
    case = Case(MIXED, shape(head_dim=head_dim, page_size=page_size), others=2)
    case.check(case.run(sms=sms))


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(group: int) -> None:
    case = Case([300, 1, 77, 1000], shape(heads=3 * group, kv_heads=3), seed=group)
    case.check(case.run())


@pytest.mark.parametrize("length", [1, 16, 17, 128, 129, 4000, 32768])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_one_row(length: int, kv_heads: int) -> None:
    case = Case([length], shape(heads=4 * kv_heads, kv_heads=kv_heads))
    case.check(case.run())


def test_no_decode_rows() -> None:
    case = Case([], shape(), others=3)
    case.check(case.run())


def test_one_long_row_among_short_ones() -> None:
    case = Case([40] * 50 + [20000] + [40] * 50, shape())
    case.check(case.run())


def test_more_rows_than_the_planning_threads() -> None:
    lens = torch.randint(1, 90, (2500,), generator=torch.Generator().manual_seed(0)).tolist()
    case = Case(lens, shape(heads=2, kv_heads=1, head_dim=64))
    case.check(case.run(sms=16))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [1, 16, 100, 129, 600])
def test_window(head_dim: int, window: int) -> None:
    case = Case(MIXED, shape(head_dim=head_dim, window=window, page_size=32))
    case.check(case.run(sms=20))


def test_range_of_rows() -> None:
    case = Case(MIXED, shape(), others=4)
    for start, stop in [(0, 7), (7, 13), (13, 100), (20, 30), (5, 5)]:
        case.check(case.run(start, stop), start, stop)


def test_concentrated_weights() -> None:
    case = Case([5000, 300, 20], shape(), scale=30.0)
    case.check(case.run())


def test_launches_on_other_sms_than_planned() -> None:
    """Fewer or more, as long as tiles are the same."""
    case = Case([3000] * 9 + [50] * 9, shape())
    for planned, sms in [(FEW_SMS, 1), (2, 16), (132, 80), (66, 132)]:
        case.check(case.run(planned=planned, sms=sms, launches=3))


@pytest.mark.parametrize("sms", [132, 8])
def test_same_in_every_run(sms: int) -> None:
    case = Case([5000, 2000, 1] + [900] * 40, shape())
    outs = [case.run(sms=sms, launches=launches)[: case.rows] for launches in (1, 4, 2)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 16), (128, 64), (64, 16)])
@pytest.mark.parametrize("sms", [132, 8])
def test_same_in_a_crowd(head_dim: int, page_size: int, sms: int, crowd: Callable[[], None]) -> None:
    """What a warp reads of its ring must have arrived before the next copy there is begun."""
    case = Case([5000, 2000, 1] + [900] * 40, shape(head_dim=head_dim, page_size=page_size))
    launch = case.planned(sms=sms)
    first, differing = launch(), torch.zeros(1, dtype=torch.int64, device="cuda")
    case.check(first)
    for _ in range(100):
        crowd()
        differing += (launch()[: case.rows] != first[: case.rows]).sum()
    assert differing.item() == 0


def test_a_row_of_nan_leaves_the_others_alone() -> None:
    case = Case([600, 600, 600], shape())
    case.q[1] = NAN
    out = case.run(sms=2)
    assert out[1].isnan().all()
    expected = case.expected(2)
    assert (out[2].double() - expected).norm() / expected.norm() < RELATIVE_ERROR


def test_replays_with_other_lengths() -> None:
    """A captured plan and attention serve whatever the device arrays hold."""
    case = Case([900, 20, 3000], shape())
    kernel = DecodeAttention(KernelLoader(artifacts(sources(), "sm_90a")), case.shape, sms=132)
    workspace = torch.empty(case.shape.workspace_bytes(132), dtype=torch.uint8, device="cuda")
    out = torch.empty((len(case.q), case.shape.num_heads * case.shape.head_dim), device="cuda").bfloat16()
    lens, graph = case.lens.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        kernel.plan(
            kv_lens=lens.data_ptr(),
            kv_indptr=case.indptr.data_ptr(),
            num_decode=case.num_decode.data_ptr(),
            workspace=workspace.data_ptr(),
            start=0,
            stop=100,
            sms=132,
            stream=stream,
        )
        for pdl in (False, True):
            kernel.launch(
                q=case.q.data_ptr(),
                q_stride=case.q.stride(0),
                kv=case.cache.data_ptr(),
                out=out.data_ptr(),
                kv_lens=lens.data_ptr(),
                kv_indptr=case.indptr.data_ptr(),
                kv_indices=case.indices.data_ptr(),
                workspace=workspace.data_ptr(),
                sms=132,
                stream=stream,
                pdl=pdl,
            )
    for kv_lens in ([900, 20, 3000], [899, 3, 2047], [1, 1, 1]):
        lens.copy_(_int32(kv_lens))
        case.kv_lens = kv_lens
        case.dense = [kv[:, :length] for kv, length in zip(case.dense, kv_lens, strict=True)]
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        case.check(out)
