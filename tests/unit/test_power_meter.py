"""The power meter on a counter that moves in steps, as a card's does."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest

from nf.bench import power


@pytest.mark.parametrize("offset", [0.0, 0.015, 0.035])
def test_power_between_steps(monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    watts, step, now = 500.0, 0.05, [0.0]

    def energy(ordinal: int) -> float:
        assert ordinal == 3
        now[0] += 0.005  # a reading takes its time
        return 1e4 + watts * step * math.floor((now[0] - offset) / step)

    monkeypatch.setattr(power, "energy", energy)
    monkeypatch.setattr(power, "sm_clock", lambda ordinal: 1980 - 1000 * now[0] if ordinal == 3 else 0)
    monkeypatch.setattr(power, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with power.PowerMeter(3) as meter:
        while now[0] < 0.4:
            time.sleep(0.005)
    assert meter.watts == pytest.approx(watts, rel=0.03)
    assert meter.between(0.15, 0.35) == pytest.approx(watts, rel=0.06)
    assert math.isnan(meter.between(0.1, 0.12))
    assert meter.megahertz == pytest.approx(1980 - 1000 * now[0] / 2, abs=60)


@pytest.mark.parametrize("joules", [math.nan, 7.0])
def test_no_steps_no_power(monkeypatch: pytest.MonkeyPatch, joules: float) -> None:
    monkeypatch.setattr(power, "energy", lambda _ordinal: joules)
    with power.PowerMeter(0) as meter:
        time.sleep(0.02)
    assert math.isnan(meter.watts)


def test_powers_of_several_gpus_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def energy(ordinal: int) -> float:
        now[0] += 0.002
        return 100.0 * (ordinal + 1) * 0.05 * math.floor(now[0] / 0.05)

    monkeypatch.setattr(power, "energy", energy)
    monkeypatch.setattr(power, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with power.PowerMeter(0, 1, poll_seconds=0.001) as meter:
        while now[0] < 0.6:
            time.sleep(0.005)
    assert meter.watts == pytest.approx(300.0, rel=0.05)


def test_no_gpu_no_power() -> None:
    with power.PowerMeter() as meter:
        pass
    assert math.isnan(meter.watts)
