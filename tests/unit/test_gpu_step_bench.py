"""Whole steps for the search without a GPU: an executor whose steps take as long as they have pages."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_bench_double import DEVICE, LLAMA, weights

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.graphs.plan import sequential_plan
from nf.models.registry import declare
from nf.planning import gpu_step_bench
from nf.planning.gpu_step_bench import GpuStepBench

ROOMY: Any = SimpleNamespace(**vars(DEVICE) | {"memory": lambda: (3 << 30, 4 << 30)})


class Executor:
    """A step takes a millisecond per page; more pages than there is room for are refused."""

    made: list[Executor]

    def __init__(self, _model: Any, weights: Any, plans: Any, *, device: Any, num_pages: int, **sizes: Any) -> None:
        assert device is ROOMY
        if plans[0].name == "bad":
            raise ValueError("bad")
        self.num_pages, self.sizes, self.weights, self.random = num_pages, sizes, weights, False
        Executor.made.append(self)

    def randomize_kv(self, seed: int) -> None:
        self.random = seed == 1

    def trace(self, batch: Any) -> list[Any]:
        return [batch.num_tokens]

    def close(self) -> None:
        self.weights.free()


def test_steps_are_measured_on_as_many_pages_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    times: set[tuple[float, float]] = set()
    Executor.made = []

    def measure(executor: Executor, batch: Any, *, warm: float, run: float) -> Measurement:
        times.add((warm, run))
        assert executor.random
        assert batch.kv_indices.max() < executor.num_pages
        assert batch.token_ids.max() < 256  # those of a small vocabulary; what is beyond it an embedding has no row for
        return Measurement(1e-3 * len(batch.kv_indices), 1.0)

    def drawn(model: Any, _seed: int) -> Any:
        made = weights(model)
        made.free = lambda: freed.append(1)
        return made

    monkeypatch.setattr(gpu_step_bench, "random_device_weights", drawn)
    monkeypatch.setattr(gpu_step_bench, "GpuExecutor", Executor)
    monkeypatch.setattr(gpu_step_bench, "artifacts", lambda *_: [])
    monkeypatch.setattr(gpu_step_bench, "measure_step", measure)
    monkeypatch.setattr(gpu_step_bench, "workspace_bytes", lambda *_, **__: 1 << 20)
    model = declare(LLAMA)
    own = GpuStepBench(model, ROOMY)
    loads = [Load(64, 40, 24), Load(64, 20, 44)]
    plan = sequential_plan(model.operations, 64)
    GpuStepBench(model, ROOMY, quick=True).measure(plan, loads)
    quick = times.pop()
    found = own.measure(plan, loads)
    assert 0.4 <= quick[0] < min(times)[0]  # a card needs as long to settle its clocks, and its counter to move
    assert 0.5 <= quick[1] < min(times)[1]
    assert [m.seconds for m in found] == [1e-3 * len(load.batch(16).kv_indices) for load in loads]
    assert Executor.made[0].num_pages == max(len(load.batch(16).kv_indices) for load in loads)
    assert own.trace(plan, loads[0]) == [64]
    large = GpuStepBench(model, ROOMY, quick=True, page_size=64)
    assert large.measure(plan, loads[:1])[0].seconds == 1e-3 * len(loads[0].batch(64).kv_indices)
    with pytest.raises(ValueError, match="bad"):
        own.measure(replace(plan, name="bad"), loads)
    assert len(freed) == 5
    monkeypatch.setattr(ROOMY, "memory", lambda: (2 << 30, 4 << 30))
    with pytest.raises(ValueError, match="leave no room for KV"):
        own.measure(plan, loads)
    assert len(freed) == 6
