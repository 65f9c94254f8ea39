"""Power and clock while something runs, by the cards' energy counters, which move about ten times a second."""

from __future__ import annotations

import math
import threading
import time

from nf.bench.card import energy, sm_clock

POLL_SECONDS = 0.002
ENGINE_POLL_SECONDS = 0.02  # beside an engine, whose host work should not be disturbed, and for seconds at least


class PowerMeter:
    """Average power of GPUs while the block runs, from the first to the last step of each energy counter in there.

    Reading the counters only at both ends would be off by up to a step at each, a fifth of half a second.

    Args:
        ordinals: the GPUs, as CUDA numbers them; their powers are added.
        poll_seconds: between readings.
    """

    def __init__(self, *ordinals: int, poll_seconds: float = POLL_SECONDS) -> None:
        self._poll_seconds = poll_seconds
        self._steps: dict[int, list[tuple[float, float]]] = {gpu: [] for gpu in ordinals}  # (seconds, joules)
        self._clocks: list[float] = []  # MHz, at every step
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="power meter", daemon=True)

    def __enter__(self) -> PowerMeter:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def watts(self) -> float:
        """NaN without GPUs, where the driver does not tell, or if the block saw fewer than two steps, which takes up
        to 0.3 s."""
        return self.between(-math.inf, math.inf)

    @property
    def megahertz(self) -> float:
        """Of the SMs, on average over the counters' steps; NaN if there was none, or the driver does not tell."""
        return sum(self._clocks) / len(self._clocks) if self._clocks else math.nan

    def between(self, start: float, end: float) -> float:
        """``watts`` by the steps between two moments of ``time.perf_counter``."""
        inside = ([step for step in steps if start <= step[0] <= end] for steps in self._steps.values())
        return sum(map(_watts, inside)) if self._steps else math.nan

    def _watch(self) -> None:
        last = {gpu: energy(gpu) for gpu in self._steps}
        while self._steps and not self._done.wait(self._poll_seconds):
            for gpu, steps in self._steps.items():
                joules = energy(gpu)
                if joules > last[gpu]:
                    steps.append((time.perf_counter(), joules))
                    self._clocks.append(sm_clock(gpu))
                    last[gpu] = joules


def _watts(steps: list[tuple[float, float]]) -> float:
    if len(steps) < 2:
        return math.nan
    (start, before), (end, after) = steps[0], steps[-1]
    return (after - before) / (end - start)
