"""Figures of the benchmarks against the same worked out another way."""

from __future__ import annotations

import ctypes
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nf.bench import card
from nf.bench.latency import poisson_arrivals
from nf.bench.metrics import summary, times
from nf.bench.report import throughput_lines
from nf.bench.roofline import Ceilings, Work, active_parameters, eq5, power_roofline, work
from nf.bench.steps import StepRecord, steady
from nf.bench.workload import Workload, constant
from nf.config import ModelConfig
from nf.errors import NfError
from nf.models.registry import declare
from nf.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput

RECORDS = Path(__file__).parents[2] / "docs/benchmarks"
LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
)
MIXTRAL = replace(LLAMA_8B, architecture="MixtralForCausalLM", vocab_size=32000, num_experts=8, experts_per_token=2)


def output(count: int, *, reason: FinishReason = "length", error: str | None = None) -> RequestOutput:
    return RequestOutput(
        "r",
        None,
        [1],
        [CompletionOutput(0, token_ids=list(range(count)), finish_reason=reason)],
        True,
        RequestMetrics(arrival_time=10.0, first_scheduled_time=10.5, first_token_time=12.0, finished_time=15.0),
        error=error,
    )


def test_times_of_a_request() -> None:
    found = times(output(4))
    assert (found.ttft, found.tpot, found.latency, found.normalized_latency) == (2.0, 1.0, 5.0, 1.25)
    late = times(output(1), arrival=9.0)
    assert (late.ttft, late.tpot, late.latency) == (3.0, None, 6.0)


def test_a_request_that_failed_is_no_measurement() -> None:
    with pytest.raises(NfError, match="request r did not run to its full length: the logits hold a NaN"):
        times(output(4, reason="error", error="the logits hold a NaN"))
    with pytest.raises(NfError, match="it ended with 'stop' after 4 tokens"):
        times(output(4, reason="stop"))


def test_summary_is_mean_and_percentiles() -> None:
    values = np.random.default_rng(0).exponential(3.0, 1001).tolist()
    ordered = sorted(values)
    found = summary([None, *values])
    assert found is not None
    assert found == pytest.approx(
        {"mean": statistics.fmean(values), "p50": ordered[500], "p90": ordered[900], "p99": ordered[990]}
    )
    assert summary([5.0]) == {"mean": 5.0, "p50": 5.0, "p90": 5.0, "p99": 5.0}
    assert summary([None]) is None


def token_moments(start: float, records: list[StepRecord]) -> Iterator[tuple[float, bool]]:
    """When each single token was done, and whether it is one of the input."""
    before = start
    for record in records:
        count = record.input_tokens + record.output_tokens
        for i in range(count):
            yield before + (record.ended - before) * (i + 1) / count, i < record.input_tokens
        before = record.ended


def test_steady_rate_is_that_of_the_middle_half_of_the_tokens() -> None:
    rng = np.random.default_rng(3)
    ended = np.cumsum(rng.uniform(0.01, 0.1, 200)) + 5.0
    tokens = rng.integers(0, 400, (200, 2))
    records = [
        StepRecord(end, in_ + out, in_, out) for end, (in_, out) in zip(ended.tolist(), tokens.tolist(), strict=True)
    ]
    moments = [moment for moment, _ in token_moments(5.0, records)]
    first, last = moments[len(moments) // 4], moments[3 * len(moments) // 4]
    found = steady(5.0, records)
    assert found is not None
    assert found.total == pytest.approx(len(moments) / 2 / (last - first), rel=1e-3)
    assert found.seconds == pytest.approx(last - first, rel=1e-3)
    assert found.input + found.output == pytest.approx(found.total)
    inputs = sum(1 for end, (in_, _) in zip(ended, tokens, strict=True) if first < end < last for _ in range(in_))
    assert found.input == pytest.approx(inputs / (last - first), rel=0.02)


def test_steady_leaves_filling_and_emptying_out() -> None:
    slow = [StepRecord(0.0 + i, 10, 0, 10) for i in range(1, 11)]
    fast = [StepRecord(10.0 + i / 10, 10, 0, 10) for i in range(1, 101)]
    found = steady(0.0, [*slow, *fast, *(StepRecord(20.0 + i, 10, 10, 0) for i in range(1, 11))])
    assert found is not None
    assert found.output == pytest.approx(100.0)
    assert found.input == 0.0


def test_no_steady_rate_without_tokens_or_time() -> None:
    assert steady(0.0, []) is None
    assert steady(0.0, [StepRecord(1.0, 0, 0, 0)]) is None
    assert steady(1.0, [StepRecord(1.0, 5, 5, 0)]) is None


def test_active_parameters_of_known_models() -> None:
    assert active_parameters(declare(LLAMA_8B)) == 8_030_261_248  # as published with the checkpoint
    tied = declare(replace(LLAMA_8B, tie_word_embeddings=True))
    assert active_parameters(tied) == 8_030_261_248 - 128256 * 4096
    all_experts = active_parameters(declare(replace(MIXTRAL, experts_per_token=8)))
    assert all_experts == 46_702_792_704
    assert active_parameters(declare(MIXTRAL)) == all_experts - 32 * 6 * 3 * 14336 * 4096


def test_eq5_at_a_known_rate() -> None:
    assert eq5(670e12, declare(LLAMA_8B)) == pytest.approx(41.7e3, rel=1e-3)


def test_work_token_by_token() -> None:
    small = replace(LLAMA_8B, num_layers=2, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
                    head_dim=16, vocab_size=50)  # fmt: skip
    lens = [(5, 3), (1, 1), (7, 4)]
    flops = kv_bytes = 0
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    for prompt, out in lens:
        for position in range(prompt + out - 1):  # rows of the dense batch; the last token is never one
            flops += 2 * 2 * layer
            if position < prompt:
                flops += 2 * 4 * (4 * 16) * (position + 1)
            else:
                kv_bytes += (position + 1) * 2 * 2 * (2 * 16) * 2
        flops += out * 2 * 50 * 64
    found = work(declare(small), Workload("w", *np.array(lens).T, seed=0))
    assert found == Work(sum(map(sum, lens)), flops, kv_bytes)
    assert work(declare(small), Workload("w", *np.array(lens).T), value_bytes=4).kv_bytes == 2 * kv_bytes


def test_power_roofline_pays_for_operations_and_bytes() -> None:
    ceilings = Ceilings(670e12, 1e-12, 4.6e12, 0.14e-9, 700.0)
    assert power_roofline(ceilings, Work(100, 5e12, 0.0)) == pytest.approx(700 * 100 / 5)
    assert power_roofline(ceilings, Work(100, 0.0, 1e9)) == pytest.approx(700 * 100 / 0.14)
    chat = work(declare(LLAMA_8B), constant(1024, 512, 1024))
    best = Ceilings(670e12, 0.87 / 893e9, 4.6e12, 0.13e-9, 700.0)
    assert 32e3 < power_roofline(best, chat) < 34e3


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = poisson_arrivals(20001, 4.0, seed=1)
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0.0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert np.mean(gaps > 0.25) == pytest.approx(math.exp(-1), abs=0.01)  # exponential: memoryless
    assert np.mean(gaps > 0.75) == pytest.approx(math.exp(-3), abs=0.005)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    np.testing.assert_allclose(poisson_arrivals(20001, 8.0, seed=1) * 2, arrivals)
    assert (poisson_arrivals(9, 1.0, seed=2) != poisson_arrivals(9, 1.0, seed=1))[1:].all()


class Nvml:
    """The calls of NVML that are made, for one GPU."""

    def nvmlDeviceGetHandleByPciBusId_v2(self, address: bytes, device: Any) -> int:  # noqa: N802
        device._obj.value = 77
        return 0 if address == b"0000:1B:00.0" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, device: ctypes.c_void_p, result: Any) -> int:  # noqa: N802
        assert device.value == 77
        result._obj.value = 123_456
        return 0

    def nvmlDeviceGetEnforcedPowerLimit(self, _device: ctypes.c_void_p, result: Any) -> int:  # noqa: N802
        result._obj.value = 700_000
        return 0

    def nvmlDeviceGetClockInfo(self, _device: ctypes.c_void_p, clock: int, result: Any) -> int:  # noqa: N802
        assert clock == 1  # that of the SMs
        result._obj.value = 1470
        return 0

    def nvmlDeviceGetMemoryInfo(self, _device: ctypes.c_void_p, result: Any) -> int:  # noqa: N802
        result._obj.used = 5 << 30
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, _size: int) -> int:  # noqa: N802
        text.value = b"580.159.03"
        return 0


@pytest.fixture
def fresh_card() -> Iterator[None]:
    card._handle.cache_clear()
    yield
    card._handle.cache_clear()


@pytest.mark.usefixtures("fresh_card")
def test_counters_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(
        cuCtxGetDevice=lambda: (201, None),
        cuDeviceGet=lambda ordinal: (0, ordinal),
        cuDeviceGetPCIBusId=lambda size, ordinal: (
            (0, b"0000:1B:00.0".ljust(size, b"\0")) if not ordinal else (101, b"")
        ),
    )

    def ask(call: Any) -> Any:
        error, result = call(driver)
        return None if error else result

    monkeypatch.setattr(card, "_driver", ask)
    monkeypatch.setattr(card, "_nvml", Nvml)
    assert (card.energy(), card.power_cap(0), card.memory_used(0)) == (123.456, 700.0, 5 << 30)
    assert card.driver_version() == "580.159.03"
    assert card.sm_clock(0) == 1470.0
    assert math.isnan(card.energy(1))
    assert card.memory_used(1) is None


@pytest.mark.usefixtures("fresh_card")
def test_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_nvml", lambda: None)
    monkeypatch.setattr(card, "_driver", lambda _call: None)
    assert math.isnan(card.energy())
    assert math.isnan(card.power_cap())
    assert math.isnan(card.sm_clock())
    assert (card.memory_used(), card.driver_version()) == (None, None)


def test_what_a_run_drew_and_how_fast_it_ran_stand_together() -> None:
    record = json.loads((RECORDS / "2026-11-29-h200-overlap-constant.json").read_text())
    record["results"]["sm_megahertz"] = 1470.4
    assert any(line.endswith("0.0244 J/token, 689 W, SMs at 1,470 MHz") for line in throughput_lines(record))
    record["results"]["sm_megahertz"] = None
    assert any(line.endswith("0.0244 J/token, 689 W") for line in throughput_lines(record))


def test_plans_beside_the_first_are_counted() -> None:
    record = json.loads((RECORDS / "2026-11-29-h200-plans-constant.json").read_text())
    title = "llama-3-8b on cuda, plan sequential and 8 for certain steps, 1,024 requests of 1,024 in / 512 out"
    assert throughput_lines(record)[0].endswith(title)
    record["options"]["plan"] = "mine"
    assert "on cuda, plan mine, 1,024" in throughput_lines(record)[0]
