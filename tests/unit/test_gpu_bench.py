"""The bench of nano-operations without a GPU: real launches of real layers, kernels that only take their time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import device_double
import pytest
from gpu_bench_double import (
    CAPTURED,
    CLOCKS,
    DEVICE,
    KERNEL_SECONDS,
    LLAMA,
    PACE,
    Event,
    Graph,
    Kernel,
    Memory,
    Meter,
    Stream,
    Time,
    capture,
    fake_lanes,
    weights,
)

from nf.bench.steady_step import Load
from nf.config import ModelConfig
from nf.executors import gpu_buffers, gpu_inputs, gpu_memory, gpu_outputs, gpu_pages
from nf.graphs.partition import Lane, PartitionError
from nf.graphs.plan import sequential_plan
from nf.kernels.device import CudaError
from nf.models.registry import declare
from nf.planning import gpu_bench, gpu_step_bench
from nf.planning.gpu_bench import GpuBench
from nf.planning.gpu_step_bench import GpuStepBench
from nf.planning.profile import Profile, ProfileKey
from nf.planning.profiling import ENDS, Extent, fill, wanted_pairs, wanted_solos

MIXTRAL = replace(LLAMA, architecture="MixtralForCausalLM", num_experts=4, experts_per_token=2, num_layers=3)
EXTENT = Extent((32, 64), (64,), (16, 32), (48, 96), (24,), (16, 24), (32,), 132)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (gpu_inputs, gpu_outputs, gpu_pages, gpu_buffers, gpu_memory):
        monkeypatch.setattr(module, "DeviceMemory", Memory)
    for module in (gpu_inputs, gpu_outputs):
        monkeypatch.setattr(module, "Event", device_double.Event)
        monkeypatch.setattr(module, "copy", device_double.copy)
    for module in (gpu_inputs, gpu_outputs, gpu_pages):
        monkeypatch.setattr(module, "PinnedMemory", Memory)
    doubles = {
        "cuda": SimpleNamespace(Stream=Stream, Event=Event, CudaError=CudaError),
        "time": Time,
        "PowerMeter": Meter,
        "power_cap": lambda: 700.0,
        "artifacts": lambda *_: [],
        "LayerKernels": lambda *_, **__: Kernel("kernels"),
        "RandomFill": lambda *_, **__: Kernel("fill"),
        "random_device_weights": lambda model, _: weights(model),
        "capture": capture,
        "lanes": fake_lanes,
        "required_partitions": lambda _: (),
        "WARM_SECONDS": 0.002,
        "_idle_watts": lambda: 120.0,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(gpu_bench, name, double)
    CLOCKS.clear()
    PACE.clear()
    CAPTURED.clear()
    Graph.live = 0
    monkeypatch.setattr(Time, "now", 0.0)
    monkeypatch.setattr(Time, "slept", 0.0)
    monkeypatch.setattr(Stream, "dead", False)
    yield
    assert Graph.live == 0


def bench(config: ModelConfig = LLAMA, run: float = 0.01) -> GpuBench:
    return GpuBench(config, EXTENT, DEVICE, run=run)


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_are_as_large_as_asked_for(page_size: int) -> None:
    own = GpuBench(LLAMA, EXTENT, DEVICE, run=0.01, page_size=page_size)
    _, batch = own._batch("decode_attention", 8, 100)
    assert len(batch.kv_indices) == 8 * -(-100 // page_size)
    own.close()


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_every_point_can_be_measured(config: ModelConfig) -> None:
    model, own = declare(config), bench(config)
    profile = Profile(ProfileKey("A GPU", "1", "x"), "small", 132)
    fill(profile, own, model.operations, EXTENT, save=lambda _: None)
    own.close()
    solos, pairs = wanted_solos(model.operations, EXTENT), wanted_pairs(model.operations, EXTENT)
    assert set(profile.solos) == set(solos)
    assert set(profile.co_runs) == set(pairs)
    # Permutation, combination; the embedding, rows of the cache and plans of attention, gathered rows and sampling.
    kernels = {"moe_gate_up_proj": 2, "moe_down_proj": 2, ENDS: 8}
    for name, rows, sms, context in solos:
        point = profile.solos[name, rows, sms, context]
        assert point.seconds == pytest.approx(kernels.get(name, 1) * KERNEL_SECONDS)
        assert point.joules == pytest.approx(500 * point.seconds)


def test_calls_go_round_over_the_layers_and_fill_a_graph() -> None:
    own = bench()
    own.solo(("qkv_proj", 64, 116, 0))
    graph = CAPTURED[-1]
    assert Counter(graph.kernels) == {"gemm 512×128 of 64": len(graph.kernels)}
    assert len(graph.kernels) % 8 == 0
    assert len(graph.kernels) >= 300
    assert [lane.sms for lane in graph.lanes] == [116]
    own.close()


def test_a_slow_start_is_not_taken_for_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are loaded by what needs them first."""
    monkeypatch.setattr(Graph, "hiccup", 0.04)
    own = bench()
    own.solo(("qkv_proj", 64, "all", 0))
    assert len(CAPTURED[-1].kernels) >= 300
    own.close()


def test_attention_leaves_the_experts_rows_of_a_gemm_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, int]] = []
    launch = gpu_bench.Layers.launch

    def noted(layers: Any, step: Any, lane: Lane, pdl: bool) -> None:
        launched.append((step.operation.name, step.stop))
        launch(layers, step, lane, pdl)

    monkeypatch.setattr(gpu_bench.Layers, "launch", noted)
    own = bench(MIXTRAL)
    own.co_run(("moe_down_proj", 32, 108, 0), ("decode_attention", 16, 24, 48))
    assert {stop for name, stop in launched if name == "moe_gate_up_proj"} == {32}
    own.close()


def test_a_bench_that_breaks_down_leaves_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Meter):
        def __enter__(self) -> Meter:
            raise CudaError("the driver answered")

    monkeypatch.setattr(gpu_bench, "PowerMeter", Broken)
    own = bench()
    for point in (("qkv_proj", 64, "all", 0), (ENDS, 64, "all", 0)):
        with pytest.raises(CudaError):
            own.solo(point)
        assert Graph.live == 0
    own.close()


def test_two_side_by_side_are_each_timed_while_both_run() -> None:
    own = bench()
    slow = own._streams[1].handle
    PACE[slow] = 3.0
    pair = own.co_run(("o_proj", 32, 108, 0), ("decode_attention", 32, 24, 48))
    assert pair.first.seconds == pytest.approx(KERNEL_SECONDS)
    assert pair.second.seconds == pytest.approx(3 * KERNEL_SECONDS)
    assert (pair.first.sms, pair.second.sms, pair.watts) == (108, 24, 500.0)
    assert [[lane.sms for lane in graph.lanes] for graph in CAPTURED[1::2]] == [[108], [24]]
    assert own._lane_of(24) is CAPTURED[-1].lanes[0]  # partitions are made once
    assert own._lane_of(108) is CAPTURED[1].lanes[0]
    own.close()


PAIR = ("o_proj", 32, "all", 0), ("decode_attention", 32, "all", 48)


def slow_beside(monkeypatch: pytest.MonkeyPatch, stream: int, pace: float) -> None:
    """What a stream runs takes longer once something runs beside it."""
    replay = gpu_bench._replay

    def slower(*values: Any) -> Any:
        PACE[stream] = pace
        return replay(*values)

    monkeypatch.setattr(gpu_bench, "_replay", slower)


@pytest.mark.parametrize("pace", [1.0, 3.0])
def test_both_sides_have_enough_enqueued_and_no_more_until_the_same_moment(
    pace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bench(run=0.5)
    slow_beside(monkeypatch, own._streams[0].handle, pace)
    own.co_run(*PAIR)
    own.close()
    for graph, slower in zip(CAPTURED[1::2], (pace, 1.0), strict=True):
        alone = KERNEL_SECONDS * len(graph.kernels)
        depth = math.ceil(gpu_bench.AHEAD_SECONDS / alone)
        assert depth > 2
        assert graph.most == depth
        assert graph.waited == 0
        late = graph.ends[-1] - graph.ends[0] + slower * alone - (0.5 + gpu_bench.WARM_SECONDS)
        assert 0 < late < (depth + 1) * slower * alone  # what is enqueued when time is up


def test_two_replays_at_least_are_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "AHEAD_SECONDS", 1e-3)
    own = bench(run=0.1)
    own.solo(("qkv_proj", 64, "all", 0))
    own.close()
    assert (CAPTURED[-1].most, CAPTURED[-1].waited) == (2, 0)


def test_a_side_that_is_slow_beside_the_other_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the three replays that tell its pace."""
    own = bench()
    slow_beside(monkeypatch, own._streams[0].handle, 47.0)  # 3 · 0.15 s, far more than it is measured for
    pair = own.co_run(*PAIR)
    own.close()
    assert pair.first.seconds == pytest.approx(47 * KERNEL_SECONDS)
    assert pair.second.seconds == pytest.approx(KERNEL_SECONDS)
    slow, other = CAPTURED[1::2]
    assert slow.most == math.ceil(gpu_bench.AHEAD_SECONDS / (KERNEL_SECONDS * len(slow.kernels)))
    assert other.waited == 0
    assert other.ends[-1] == pytest.approx(slow.ends[2], abs=gpu_bench.AHEAD_SECONDS + 5e-3)


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    own = bench()
    slow_beside(monkeypatch, own._streams[0].handle, 1e6)
    pair = own.co_run(*PAIR)
    own.close()
    other = CAPTURED[3]
    taken = 0.01 + gpu_bench.WARM_SECONDS + gpu_bench.PATIENCE_SECONDS
    assert other.ends[-1] - other.ends[0] == pytest.approx(taken, abs=gpu_bench.AHEAD_SECONDS + 5e-3)
    assert pair.first.seconds > 100 * KERNEL_SECONDS


def test_a_gpu_that_is_gone_is_told_by_its_first_error() -> None:
    own, saves = bench(), list[int]()
    assert not own.broken
    profile = Profile(ProfileKey("A GPU", "1", "x"), "small", 132)

    def progress(_: str) -> None:
        if len(profile.solos) == 3:
            Stream.dead = True

    operations = own.model.operations
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"), closing(own):
        fill(profile, own, operations, EXTENT, save=lambda p: saves.append(len(p.solos)), progress=progress)
    assert own.broken
    assert saves == [3]
    own.close()


def test_an_error_while_freeing_is_told_where_there_was_none_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Stream) -> None:
        raise CudaError("the driver refuses to free")

    monkeypatch.setattr(Stream, "free", refuse)
    own = bench()
    with pytest.raises(CudaError, match="refuses to free"):
        own.close()


def test_nothing_is_measured_on_partitions_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sms: Any) -> Any:
        if any(count != "all" for count in sms):
            raise PartitionError("SM partitions are not available")

    for module in (gpu_bench, gpu_step_bench):
        monkeypatch.setattr(module, "required_partitions", refuse)
    own = bench()
    own.solo(("qkv_proj", 64, "all", 0))
    measured = len(CAPTURED)
    with pytest.raises(PartitionError):
        own.solo(("qkv_proj", 64, 116, 0))
    with pytest.raises(PartitionError):
        own.co_run(("o_proj", 32, 108, 0), ("decode_attention", 32, 24, 48))
    assert len(CAPTURED) == measured
    own.close()
    plan = sequential_plan(own.model.operations, 64)
    plan = replace(plan, streams=(replace(plan.streams[0], sms=116),))
    monkeypatch.setattr(gpu_step_bench, "artifacts", lambda *_: pytest.fail("compiled for nothing"))
    with pytest.raises(PartitionError):
        GpuStepBench(own.model, DEVICE).measure(plan, [Load(64, 40, 24)])


def test_a_side_that_gets_nowhere_is_slow_not_as_fast_as_alone() -> None:
    own = bench()
    PACE[own._streams[0].handle] = 1e9
    pair = own.co_run(("o_proj", 32, "all", 0), ("decode_attention", 32, "all", 48))
    assert pair.first.seconds > 10 * KERNEL_SECONDS
    assert pair.second.seconds == pytest.approx(KERNEL_SECONDS)
    own.close()


@pytest.mark.parametrize(
    ("ends", "stop", "seconds"),
    [
        ([1.0, 1.1, 1.2, 1.3], 1.25, 0.1),
        ([0.0005, 1.0, 1.4], 1.1, 0.9995),  # one before all was warm
        ([0.7, 1.5], 1.1, 0.7),
        ([2.0, 3.0], 1.1, 1.1),
    ],
)
def test_the_pace_is_that_of_the_time_that_both_ran(ends: list[float], stop: float, seconds: float) -> None:
    assert gpu_bench._pace(ends, stop) == pytest.approx(seconds)


@pytest.mark.parametrize(("rows", "context"), [(32, 24), (64, 24), (16, 24), (7, 24), (64, 0), (1, 24)])
def test_prompts_have_the_rows_and_the_context(rows: int, context: int) -> None:
    own = bench()
    tokens, batch = own._batch("prefill_attention", rows, context)
    assert batch.num_tokens == tokens == rows
    assert batch.num_decode == 0
    if context:
        whole = rows // (2 * context) * (2 * context)
        if rows in (whole, rows % (2 * context)):
            assert batch.positions.mean() + 0.5 == pytest.approx(context, abs=1)
    assert batch.kv_indices.max() < own._num_pages
    tokens, batch = own._batch("decode_attention", rows, 96)
    assert batch.num_decode == tokens == rows
    assert set(batch.kv_lens) == {96}
    own.close()
