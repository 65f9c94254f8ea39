"""Kernels, streams, events and graphs that only take their time, for the bench of nano-operations.

Streams are clocks, a kernel takes 10 µs of its stream's, and the host has memory in place of the device. The host has
a clock as well, which looking at it and sleeping move on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import device_double
import numpy as np
import pytest

from nf.config import ModelConfig
from nf.executors import gpu_buffers, gpu_inputs, gpu_memory, gpu_outputs, gpu_pages
from nf.graphs.partition import Lane
from nf.kernels.device import CudaError
from nf.planning import gpu_bench, steady_replays
from nf.planning.gpu_bench import GpuBench
from nf.planning.profiling import Extent

KERNEL_SECONDS = 1e-5
EXTENT = Extent((32, 64), (64,), (16, 32), (48, 96), (24,), (16, 24), (32,), 132)
LLAMA = ModelConfig("LlamaForCausalLM", 512, 128, 192, 12, 4, 2, 64, 1e-6, 256)

LAUNCHED: list[str] = []
CLOCKS: defaultdict[int, float] = defaultdict(float)  # stream → when it is done with what is enqueued
PACE: defaultdict[int, float] = defaultdict(lambda: 1.0)  # stream → how much longer everything takes


class Time:
    """The module ``time`` of the host."""

    now = 0.0
    slept = 0.0

    @staticmethod
    def perf_counter() -> float:
        Time.now += 1e-6
        return Time.now

    @staticmethod
    def sleep(seconds: float) -> None:
        Time.now += seconds
        Time.slept += seconds
        assert Time.slept < 20  # somebody waits for what does not come


class Kernel:
    """Any kernel and any group of kernels: what is called is noted."""

    workspace_bytes = 256

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_values: Any, **_named: Any) -> None:
        LAUNCHED.append(self.name)

    launch = __call__

    def __getattr__(self, name: str) -> Kernel:
        return Kernel(f"{self.name}.{name}")

    def product(self, n: int, k: int, capacity: int, **_: Any) -> Kernel:
        return Kernel(f"gemm {n}×{k} of {capacity}")


class Memory(device_double.Memory):
    def upload(self, array: np.ndarray, offset: int = 0) -> None:
        self.array[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Stream:
    made = 0
    dead = False  # the GPU: every call is refused

    def __init__(self, _priority: int = 0) -> None:
        Stream.made += 1
        self.handle = Stream.made

    def synchronize(self) -> None:
        if Stream.dead:
            raise CudaError("the driver answered CUDA_ERROR_ILLEGAL_ADDRESS")
        device_double.finish()
        Time.now = max(Time.now, CLOCKS[self.handle])

    def free(self) -> None:
        if Stream.dead:
            raise CudaError("the driver refuses to free")


class Event:
    def __init__(self, *, timing: bool = False) -> None:
        assert timing

    def record(self, stream: int) -> None:
        self.moment = max(Time.now, CLOCKS[stream])

    def block(self, stream: int) -> None:
        CLOCKS[stream] = max(CLOCKS[stream], self.moment)

    @property
    def reached(self) -> bool:
        return self.moment <= Time.now

    def since(self, start: Event) -> float:
        return self.moment - start.moment

    def free(self) -> None:
        pass


class Graph:
    live = 0
    hiccup = 0.0  # seconds that the first replays of every graph take longer, each half as long as the one before

    def __init__(self, kernels: list[str], lanes: Sequence[Lane]) -> None:
        self.kernels, self.lanes = kernels, lanes
        self.late = Graph.hiccup
        self.ends: list[float] = []
        self.most = 0  # replays enqueued and not done, at any time
        self.waited = 0.0  # seconds of its stream between two replays, with nothing enqueued
        Graph.live += 1

    def launch(self, stream: int) -> None:
        start = max(Time.now, CLOCKS[stream])
        if self.ends:
            self.waited += start - CLOCKS[stream]
        CLOCKS[stream] = start + KERNEL_SECONDS * len(self.kernels) * PACE[stream] + self.late
        self.ends.append(CLOCKS[stream])
        self.most = max(self.most, sum(end > Time.now for end in self.ends))
        self.late = self.late / 2 if self.late > 0.01 else 0.0

    def upload(self, _stream: int) -> None:
        pass

    def free(self) -> None:
        Graph.live -= 1


class Meter:
    watts = 500.0

    def __init__(self, _ordinal: int) -> None:
        pass

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def between(self, start: float, end: float) -> float:
        return self.watts if end > start else float("nan")


CAPTURED: list[Graph] = []


def capture(steps: Sequence[Any], lanes: Sequence[Lane], origin: int, *, begin: Any, launch: Any, finish: Any) -> Graph:
    LAUNCHED.clear()
    begin(origin)
    for step in steps:
        launch(step, lanes[step.stream], True)
    finish(origin)
    CAPTURED.append(Graph(list(LAUNCHED), lanes))
    return CAPTURED[-1]


def fake_lanes(streams: Sequence[Any], total: int) -> tuple[Lane, ...]:
    assert sum(s.sms for s in streams if s.sms != "all") <= total
    return tuple(Lane(s.name, Stream().handle, total if s.sms == "all" else s.sms) for s in streams)


DEVICE: Any = SimpleNamespace(
    name="A GPU", sms=132, arch="sm_90a", memory=lambda: (64 << 20, 128 << 20), use=lambda: None
)


def weights(model: Any) -> Any:
    layers = tuple({weight.name: 1 for weight in model.layer_weights} for _ in range(model.config.num_layers))
    return SimpleNamespace(embed=1, final_norm=1, lm_head=1, layers=layers, free=lambda: None)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``GpuBench`` find these, with nothing launched and no time gone by."""
    for module in (gpu_inputs, gpu_outputs, gpu_pages, gpu_buffers, gpu_memory):
        monkeypatch.setattr(module, "DeviceMemory", Memory)
    for module in (gpu_inputs, gpu_outputs):
        monkeypatch.setattr(module, "Event", device_double.Event)
        monkeypatch.setattr(module, "copy", device_double.copy)
    for module in (gpu_inputs, gpu_outputs, gpu_pages):
        monkeypatch.setattr(module, "PinnedMemory", Memory)
    doubles = {
        "cuda": SimpleNamespace(Stream=Stream, Event=Event, CudaError=CudaError),
        "power_cap": lambda: 700.0,
        "artifacts": lambda *_: [],
        "LayerKernels": lambda *_, **__: Kernel("kernels"),
        "RandomFill": lambda *_, **__: Kernel("fill"),
        "random_device_weights": lambda model, _: weights(model),
        "capture": capture,
        "lanes": fake_lanes,
        "required_partitions": lambda _: (),
        "_idle_watts": lambda: 120.0,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(gpu_bench, name, double)
    replaying = {"cuda": doubles["cuda"], "time": Time, "PowerMeter": Meter, "WARM_SECONDS": 0.002}
    for name, double in replaying.items():
        monkeypatch.setattr(steady_replays, name, double)
    CLOCKS.clear()
    PACE.clear()
    CAPTURED.clear()
    Graph.live = 0
    monkeypatch.setattr(Time, "now", 0.0)
    monkeypatch.setattr(Time, "slept", 0.0)
    monkeypatch.setattr(Stream, "dead", False)


def bench(config: ModelConfig = LLAMA, run: float = 0.01) -> GpuBench:
    return GpuBench(config, EXTENT, DEVICE, run=run)
