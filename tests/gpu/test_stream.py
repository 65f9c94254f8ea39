"""The kernels that only benchmarks and traces launch do what their names say."""

from __future__ import annotations

import pytest

from nf.kernels import stream
from nf.kernels.load import KernelLoader
from nf.kernels.registry import artifacts
from nf.kernels.stamp import STAMP, Stamp

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("threads", [256, 512])
@pytest.mark.parametrize("size", [0, 16, 4096, 100_000 * 16, (1 << 22) + 15])
def test_copy(size: int, threads: int) -> None:
    source = torch.randint(0, 256, ((1 << 22) + 16,), device="cuda", dtype=torch.uint8)
    target = torch.zeros_like(source)
    copy = stream.StreamCopy(KernelLoader(artifacts([stream.COPY], "sm_90a")), threads=threads)
    copy.launch(source.data_ptr(), target.data_ptr(), size, stream=torch.cuda.current_stream().cuda_stream, pdl=True)
    done = size // 16 * 16
    assert torch.equal(target[:done], source[:done])
    assert not target[done:].any()


@pytest.mark.parametrize(("warps", "stages"), [(4, 3), (2, 6), (1, 12)])
@pytest.mark.parametrize("sms", [1, 132])
def test_read_ends(warps: int, stages: int, sms: int) -> None:
    memory = torch.empty(1 << 24, device="cuda", dtype=torch.uint8)
    read = stream.StreamRead(KernelLoader(artifacts([stream.READ], "sm_90a")), warps=warps, stages=stages)
    read.launch(memory.data_ptr(), memory.numel(), sms=sms, stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


def test_stamps_are_of_one_clock_in_nanoseconds() -> None:
    """Held against the events of the driver, around a copy that takes some milliseconds."""
    source = torch.empty(1 << 32, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    out = torch.zeros(3, device="cuda", dtype=torch.int64)
    loader = KernelLoader(artifacts([STAMP, stream.COPY], "sm_90a"))
    stamp, copy = Stamp(loader), stream.StreamCopy(loader)
    on = torch.cuda.current_stream().cuda_stream
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):  # once to load the kernels
        start.record()
        stamp.launch(out.data_ptr(), stream=on)
        copy.launch(source.data_ptr(), target.data_ptr(), source.numel(), stream=on)
        stamp.launch(out.data_ptr() + 8, stream=on)
        end.record()
    torch.cuda.synchronize()
    first, last, never = out.tolist()
    assert never == 0
    assert last - first == pytest.approx(1e6 * start.elapsed_time(end), rel=0.1)
