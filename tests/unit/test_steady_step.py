"""How a step is measured over and over, on an executor whose clock is ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nf.bench import steady_step
from nf.bench.steady_step import IN_FLIGHT, Load, measure_step

STEP, FIRST = 0.07, 0.9  # seconds: any step, and the first, which loads kernels


class Executor:
    """Steps take their time when they are waited for."""

    def __init__(self) -> None:
        self.now, self.submitted, self.waiting = 0.0, 0, 0

    def submit(self, _batch: Any) -> Any:
        seconds = STEP if self.submitted else FIRST
        self.submitted += 1
        self.waiting += 1
        assert self.waiting <= IN_FLIGHT + 1

        def result() -> None:
            self.now += seconds
            self.waiting -= 1

        return SimpleNamespace(result=result)


class Meter:
    watts = 600.0

    def __init__(self, _device: int) -> None:
        pass

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_slow_first_step_shortens_neither_warming_up_nor_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    executor: Any = Executor()
    monkeypatch.setattr(steady_step, "PowerMeter", Meter)
    monkeypatch.setattr(steady_step, "time", SimpleNamespace(perf_counter=lambda: executor.now))
    found = measure_step(executor, Load(64, 40, 24).batch(16), warm=2.0, run=2.0)
    assert found.seconds == pytest.approx(STEP)
    assert found.joules == pytest.approx(600 * STEP)
    assert executor.now == pytest.approx(4.0, abs=5 * STEP)


def test_the_step_of_a_load_that_only_decodes() -> None:
    load = Load(64, 40, 24, decode_only=True)
    batch = load.batch(16)
    assert (batch.num_decode, batch.num_tokens, batch.num_seqs) == (64, 64, 64)
    assert batch.qo_indptr.tolist() == list(range(65))
    assert batch.sampling.rows.tolist() == list(range(64))
    assert batch.kv_lens.tolist() == load.kv_lens()
    assert (batch.positions == batch.kv_lens - 1).all()
    assert (batch.kv_lens.min(), batch.kv_lens.max()) == (41, 64)  # from the first token of 24 to the last
    assert len(set(batch.kv_indices.tolist())) == int((-(-batch.kv_lens // 16)).sum())
