"""The bench of nano-operations without a GPU: real launches of real layers, kernels that only take their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from gpu_bench_double import CAPTURED, DEVICE, EXTENT, KERNEL_SECONDS, LLAMA, Graph, Meter, Stream, bench, install

from nf.bench.steady_step import Load
from nf.config import ModelConfig
from nf.graphs.partition import Lane, PartitionError
from nf.graphs.plan import sequential_plan
from nf.kernels.device import CudaError
from nf.models.registry import declare
from nf.planning import gpu_bench, gpu_step_bench, steady_replays
from nf.planning.gpu_bench import GpuBench
from nf.planning.gpu_step_bench import GpuStepBench
from nf.planning.profile import Profile, ProfileKey
from nf.planning.profiling import ENDS, fill, wanted_pairs, wanted_solos

MIXTRAL = replace(LLAMA, architecture="MixtralForCausalLM", num_experts=4, experts_per_token=2, num_layers=3)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(monkeypatch)
    yield
    assert Graph.live == 0


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

    monkeypatch.setattr(steady_replays, "PowerMeter", Broken)
    own = bench()
    for point in (("qkv_proj", 64, "all", 0), (ENDS, 64, "all", 0)):
        with pytest.raises(CudaError):
            own.solo(point)
        assert Graph.live == 0
    own.close()


def test_two_replays_at_least_are_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady_replays, "AHEAD_SECONDS", 1e-3)
    own = bench(run=0.1)
    own.solo(("qkv_proj", 64, "all", 0))
    own.close()
    assert (CAPTURED[-1].most, CAPTURED[-1].waited) == (2, 0)


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
