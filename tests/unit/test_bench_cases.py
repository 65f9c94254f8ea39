"""The cases of ``nf bench kernels`` on doubles of cupy and of the kernels: every launch is given memory that is still
somebody's. What a case has let go of belongs to the next one, whose row counts it would overwrite.
"""

from __future__ import annotations

import math
import struct
import sys
import weakref
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nf.bench import (
    cublas,
    decode_attention_cases,
    gemm_cases,
    launch_cases,
    memory_cases,
    moe_cases,
    prefill_attention_cases,
    sampling_cases,
)
from nf.bench import kernels as bench_kernels
from nf.bench.kernels import Bench, Row
from nf.bench.measure import Measurement
from nf.kernels import gemm, rows
from nf.kernels.registry import all_sources
from nf.kernels.source import KernelSource

SMS = 132
STREAM = 7
CASES = (
    gemm_cases,
    moe_cases,
    decode_attention_cases,
    prefill_attention_cases,
    memory_cases,
    sampling_cases,
    launch_cases,
)


class Memory:
    """What is allocated and has been asked for its address: first byte → one past the last."""

    def __init__(self) -> None:
        self.ends: dict[int, int] = {}

    def note(self, array: np.ndarray) -> None:
        """Its memory goes back when nobody has it any more."""
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        start = owner.ctypes.data
        if start not in self.ends:
            self.ends[start] = start + owner.nbytes
            weakref.finalize(owner, self.ends.pop, start)

    def check(self, pointer: int, what: str) -> None:
        assert any(start <= pointer < end for start, end in self.ends.items()), f"{what} is given memory of nobody"


class Array(np.ndarray):
    """An array with cupy's way to its address; views keep what they are of."""

    memory: Memory

    @property
    def data(self) -> Any:  # type: ignore[override]
        self.memory.note(self)
        return SimpleNamespace(ptr=self.ctypes.data)


def give(array: np.ndarray) -> Any:
    return array.view(Array)


class Cupy(ModuleType):
    """As much of cupy as the cases use. What is normal there is zero here: nobody looks, but cases multiply it."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.uint8, self.uint16, self.uint32, self.uint64 = np.uint8, np.uint16, np.uint32, np.uint64
        self.int32, self.float32 = np.int32, np.float32
        self.empty = lambda shape, dtype=np.float32: give(np.empty(shape, dtype))
        self.zeros = lambda shape, dtype=np.float32: give(np.zeros(shape, dtype))
        self.full = lambda shape, value, dtype=None: give(np.full(shape, value, dtype))
        self.arange = lambda *args, dtype=None: give(np.arange(*args, dtype=dtype))
        self.array = self.asarray = lambda values, dtype=None: give(np.array(values, dtype))
        generator = np.random.default_rng(0)
        self.random = SimpleNamespace(
            permutation=lambda count: give(generator.permutation(count)),
            randint=lambda *args: give(generator.integers(*args)),
            random=lambda shape: give(generator.random(shape)),
            standard_normal=lambda shape, dtype: give(np.zeros(shape, dtype)),
        )
        calls = dict.fromkeys(("synchronize", "begin_capture", "end_capture"), lambda: None)
        stream = SimpleNamespace(ptr=STREAM, **calls)
        device = SimpleNamespace(synchronize=lambda: None, attributes={"MultiProcessorCount": SMS}, id=0)
        self.cuda = SimpleNamespace(Device=lambda: device, Stream=lambda **_: stream, get_current_stream=lambda: stream)


class Loader:
    """Kernels that look at what they are launched with."""

    def __init__(self, memory: Memory, sources: list[KernelSource]) -> None:
        self.memory = memory
        self.launched: set[str] = set()
        self._sources = {source.name: source for source in sources}

    def cuda(self, name: str, *, shared_bytes: int = 0) -> Any:
        assert 0 <= shared_bytes <= 227 * 1024
        source = self._sources[name]

        def launch(*values: Any, grid: int, block: int, stream: int, pdl: bool = False) -> None:
            assert grid >= 1
            assert block % 32 == 0
            assert isinstance(pdl, bool)
            self._check(source, values, stream)

        return SimpleNamespace(launch=launch, relaunch=lambda: None)

    def cute(self, name: str) -> Any:
        source = self._sources[name]
        return SimpleNamespace(launch=lambda *values, stream: self._check(source, values, stream))

    def _check(self, source: KernelSource, values: tuple[Any, ...], stream: int) -> None:
        assert stream == STREAM
        self.launched.add(source.name)
        for kind, value in zip(source.parameters, values, strict=True):
            if isinstance(kind, int):
                for pointer in struct.unpack(f"{kind}Q", value):
                    self.memory.check(pointer, source.name)
            elif kind == "pointer" and value:
                self.memory.check(value, source.name)
            elif kind.startswith("int"):
                assert int(value) == value
                assert abs(value) < 1 << (31 if kind == "int32" else 63)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    memory = Memory()
    made = Loader(memory, all_sources())
    monkeypatch.setattr(Array, "memory", memory, raising=False)
    monkeypatch.setitem(sys.modules, "cupy", Cupy())
    monkeypatch.setattr(bench_kernels, "artifacts", lambda *_: [])
    monkeypatch.setattr(bench_kernels, "KernelLoader", lambda _artifacts: made)
    monkeypatch.setattr(rows, "device_sms", lambda: SMS)
    monkeypatch.setattr(sampling_cases, "COUNT", 16)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        assert scale > 0
        return give(np.empty(shape, np.uint16))

    def measure(calls: list[Any], **options: Any) -> Measurement:
        for call in calls:
            call(options.get("on") or STREAM)
        return Measurement(1e-3, 0.5)

    def gemm_ex(_handle: Any, *arguments: Any) -> int:
        for pointer in (value.value for value in arguments if isinstance(getattr(value, "value", None), int)):
            if pointer > 1 << 32:
                memory.check(pointer, "cuBLAS")
        return 0

    library = SimpleNamespace(cublasSetStream_v2=lambda *_: 0, cublasGemmEx=gemm_ex)
    monkeypatch.setattr(cublas, "_cublas", lambda: (library, None))
    monkeypatch.setattr(gemm_cases, "partition_stream", lambda _sms: STREAM)
    monkeypatch.setattr(bench_kernels, "normal", normal)
    for module in (bench_kernels, *CASES):
        if hasattr(module, "measure"):
            monkeypatch.setattr(module, "measure", measure)
    return made


@pytest.mark.parametrize("module", CASES, ids=lambda module: module.__name__.rsplit(".", 1)[1])
def test_every_case_holds_on_to_its_memory(module: ModuleType, loader: Loader) -> None:
    found = list(module.rows(Bench([])))
    assert found
    assert all(isinstance(row, Row) for row in found)
    assert len({(row.kernel, row.case) for row in found}) == len(found)
    assert all(math.isfinite(row.score) and row.score > 0 for row in found)
    assert loader.launched


@pytest.mark.usefixtures("loader")
def test_attention_on_few_sms_and_the_read_beside_it_run_on_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int | None] = []
    monkeypatch.setattr(gemm_cases, "partition_stream", lambda sms: STREAM + sms)
    monkeypatch.setattr(decode_attention_cases, "call", lambda *_: lambda _stream: None)

    def measure(_calls: list[Any], on: int | None = None) -> Measurement:
        streams.append(on)
        return Measurement(1e-3, 0.5)

    monkeypatch.setattr(decode_attention_cases, "measure", measure)
    monkeypatch.setattr(bench_kernels, "measure", measure)
    list(decode_attention_cases.rows(Bench([])))
    few = [on for on in streams if on is not None]
    assert few == [STREAM + sms for sms in (16, 24, 32) for _ in range(1 + 3)]  # and three rings


def test_the_layers_run_what_the_table_names(loader: Loader) -> None:
    list(gemm_cases.rows(Bench([])))
    layers = {(n, k) for shapes in gemm_cases.MODELS.values() for n, k in shapes.values()}
    checked = [
        choice.config.source("none").name
        for (n, k, sms, count), choice in gemm._table().items()
        if (n, k) in layers and sms == SMS and count in gemm_cases.ROWS
    ]
    assert checked
    assert set(checked) <= loader.launched
