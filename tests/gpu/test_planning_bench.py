"""Profiles and whole steps measured on the GPU: every point there is can be had; how fast is not a test's business."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from gpu_runs import model_for_gpu

from nf.bench.steady_step import Load
from nf.kernels.device import Device
from nf.planning.gpu_bench import GpuBench, profile_key
from nf.planning.gpu_step_bench import GpuStepBench
from nf.planning.profile import Profile
from nf.planning.profiling import Extent, fill, missing_points
from nf.planning.search import candidates, search

pytestmark = pytest.mark.gpu

EXTENT = Extent((256, 512), (512,), (64, 128), (64, 128), (64,), (16, 24), (256,), 132)


@pytest.fixture(scope="module")
def device() -> Device:
    return Device()


EXPERTS = {"architecture": "MixtralForCausalLM", "num_experts": 8, "experts_per_token": 2}


@pytest.fixture(params=[{}, EXPERTS], ids=["dense", "experts"])
def bench(request: pytest.FixtureRequest, device: Device) -> Iterator[GpuBench]:
    made = GpuBench(model_for_gpu(**request.param).config, EXTENT, device, run=0.02)
    yield made
    made.close()


@pytest.mark.alone
def test_a_profile_is_filled(bench: GpuBench, device: Device) -> None:
    profile = Profile(profile_key(device), "small", device.sms)
    fill(profile, bench, bench.model.operations, EXTENT, save=lambda _: None)
    assert missing_points(profile, bench.model.operations, EXTENT).count == 0
    times = [(key, point.seconds) for key, point in profile.solos.items()]
    times += [(side, side.seconds) for pair in profile.co_runs.values() for side in (pair.first, pair.second)]
    assert [(point, seconds) for point, seconds in times if not 0 < seconds < 0.01] == []


def test_power_is_that_of_the_card(device: Device) -> None:
    bench = GpuBench(model_for_gpu().config, EXTENT, device)
    cost = bench.solo(("qkv_proj", 512, "all", 0))
    bench.close()
    assert math.isnan(cost.joules) or 30 < cost.joules / cost.seconds < 1.1 * bench.cap_watts


def test_the_baselines_run_as_whole_steps(device: Device) -> None:
    model = model_for_gpu()
    loads = [Load(512, 40, 24), Load(512, 20, 100), Load(512, 40, 24, decode_only=True)]
    bench = GpuStepBench(model, device, quick=True)
    found = search(candidates(model, None, loads, device.sms), loads, bench)
    assert [len(result.measured) for result in found.results] == [3, 3, 3, 3]
    names = {operation.name for operation in model.operations}
    for load, left_out in ((loads[0], set()), (loads[2], {"prefill_attention"})):
        spans = bench.trace(found.results[2].candidate.plan, load)
        assert names & {span.name.split(" [")[0] for span in spans} == names - left_out
