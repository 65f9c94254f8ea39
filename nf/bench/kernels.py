"""``nf bench kernels``: every kernel against a reference in the same run, at steady state.

A kernel's cases stand in ``nf/bench/<kernel>_cases.py`` as a function ``rows(bench) -> Iterator[Row]``. A score is the
kernel's speed over the reference's: 1 is as fast, and a floor is the least it should be.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Literal

from nf.bench import cublas
from nf.bench.environment import environment
from nf.bench.measure import Call, Measurement, measure, need_cupy
from nf.kernels.load import KernelLoader
from nf.kernels.registry import all_sources, artifacts
from nf.kernels.source import KernelSource

CASES = ("gemm", "moe", "decode_attention", "prefill_attention", "memory", "sampling", "launch")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    ``work`` is what one call must do, in bytes, floating-point operations or launches. ``score`` is relative to
    ``reference``; ``floor`` is None where none is set. ``beside`` are scores against further references that explain
    the first.
    """

    kernel: str
    case: str
    measured: Measurement
    work: float
    unit: Literal["B", "FLOP", "launch"]
    reference: str
    score: float
    floor: float | None
    beside: tuple[tuple[str, float], ...] = ()

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.measured.seconds

    @property
    def holds(self) -> bool:
        return self.floor is None or self.score >= self.floor


class Bench:
    """What the cases share: the kernels, random data and the ceilings of this card, measured once."""

    def __init__(self, sources: list[KernelSource], arch: str = "sm_90a") -> None:
        import cupy

        cupy.cuda.Device().synchronize()  # makes the context that kernels are loaded into
        self.loader = KernelLoader(artifacts(sources, arch))

    @cached_property
    def sms(self) -> int:
        import cupy

        return int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        """Normal random numbers as bf16 (cupy uint16 holding the bits)."""
        return normal(*shape, scale=scale)

    def rotate(self, make: Callable[[], Call], bytes_per_call: int, *, at_least: int = 256 << 20) -> list[Call]:
        """Calls on enough sets of buffers that the L2 cache cannot hold what the next one reads."""
        return [make() for _ in range(max(1, math.ceil(at_least / bytes_per_call)))]

    def read_rate(self, sms: int | None = None, on: int | None = None) -> float:
        """Bytes per second of a pure streaming read on ``sms`` SMs: the best of a few rings.

        Args:
            sms: None is all.
            on: stream of a partition of so many; None lets that many CTAs run anywhere.
        """
        from nf.kernels import stream

        sms = sms or self.sms
        key = sms, on
        if key not in self._read_rates:
            memory = self.normal(1 << 30)  # 2 GiB
            best = 0.0
            for warps, stages in ((4, 3), (2, 6), (1, 12)):
                read = stream.StreamRead(self.loader, warps=warps, stages=stages)

                def call(stream: int, read: Any = read) -> None:
                    read.launch(memory.data.ptr, memory.nbytes, sms=sms, stream=stream)

                best = max(best, memory.nbytes / measure([call], on=on).seconds)
            self._read_rates[key] = best
        return self._read_rates[key]

    @cached_property
    def _read_rates(self) -> dict[tuple[int, int | None], float]:
        return {}

    @property
    def copy_rate(self) -> float:
        """Bytes per second, read and written together, of a streaming copy of 1 GiB."""
        return self.copy_rate_of(2 << 30)

    def copy_rate_of(self, work: int) -> float:
        """Bytes per second of copies that read and write ``work`` bytes together, straight after one another on data
        that the L2 cache does not hold: what is left of a streaming copy's rate at that size; the best of two shapes.
        """
        from nf.kernels import stream

        if work not in self._copy_rates:
            size = work // 2
            count = max(1, math.ceil((256 << 20) / work))
            source, target = (self.normal(count * size // 2) for _ in range(2))
            seconds = []
            for threads in (256, 512):
                copy = stream.StreamCopy(self.loader, threads=threads)

                def call(on: int, at: int, copy: Any = copy) -> None:
                    copy.launch(source.data.ptr + at, target.data.ptr + at, size, stream=on, pdl=True)

                seconds.append(measure([partial(call, at=i * size) for i in range(count)]).seconds)
            self._copy_rates[work] = work / min(seconds)
        return self._copy_rates[work]

    @cached_property
    def _copy_rates(self) -> dict[int, float]:
        return {}


def normal(*shape: int, scale: float = 1.0) -> Any:
    """Normal random numbers as bf16 (cupy uint16 holding the bits)."""
    import cupy

    bits = (cupy.random.standard_normal(shape, dtype=cupy.float32) * scale).view(cupy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(cupy.uint16)


def pointers(*arrays: Any) -> tuple[int, ...]:
    """Of CuPy arrays: launches whose host time is measured are given integers, as an engine gives them, for to ask an
    array takes longer than to pass on several arguments."""
    return tuple(array.data.ptr for array in arrays)


def run(only: list[str]) -> Iterator[Row]:
    """The rows of the chosen cases, of all if none is named, as they are measured.

    Raises:
        NfError: cupy is not installed.
    """
    need_cupy()
    bench = Bench(all_sources())
    for name in only or CASES:
        yield from importlib.import_module(f"nf.bench.{name}_cases").rows(bench)


def line(row: Row) -> str:
    """A row of the table as text."""
    rates = {"B": f"{row.rate / 1e12:7.2f} TB/s   ", "FLOP": f"{row.rate / 1e12:7.1f} TFLOP/s", "launch": " " * 15}
    floor = "" if row.floor is None else f" (floor {row.floor:.2f}{'' if row.holds else ', missed'})"
    watts = "" if math.isnan(row.measured.joules) else f"{row.measured.watts:4.0f} W"
    beside = "".join(f", {score:5.3f} × {reference}" for reference, score in row.beside)
    return (
        f"{row.kernel:18} {row.case:44} {row.measured.seconds * 1e6:9.1f} µs {rates[row.unit]} {watts:6}  "
        f"{row.score:5.3f} × {row.reference}{floor}{beside}"
    )


def record(rows: list[Row]) -> dict[str, Any]:
    """The rows with where and when they were measured."""
    return {
        "benchmark": "kernels",
        "environment": environment() | {"cublas": cublas.version()},
        "rows": [asdict(row) | {"rate": row.rate, "holds": row.holds} for row in rows],
    }
