"""Power while something runs, by the card's energy counter, which moves about ten times a second."""

from __future__ import annotations

import threading
import time

from nf.bench.card import energy

POLL_SECONDS = 0.002  # between readings


class PowerMeter:
    """Average power of a GPU while the block runs, from the first to the last step of its energy counter in there.

    Reading the counter only at both ends would be off by up to a step at each, a fifth of half a second.

    Args:
        ordinal: the GPU, as CUDA numbers it.
    """

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal
        self._steps: list[tuple[float, float]] = []  # (seconds, joules)
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
        """NaN where the driver does not tell, or the block saw fewer than two steps, which takes up to 0.3 s."""
        if len(self._steps) < 2:
            return float("nan")
        (start, before), (end, after) = self._steps[0], self._steps[-1]
        return (after - before) / (end - start)

    def _watch(self) -> None:
        last = energy(self._ordinal)
        while not self._done.wait(POLL_SECONDS):
            joules = energy(self._ordinal)
            if joules > last:
                self._steps.append((time.perf_counter(), joules))
                last = joules
