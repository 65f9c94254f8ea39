"""What `nf generate` says on stderr while it works and when it is done."""

from __future__ import annotations

import statistics
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nf.outputs import RequestOutput


class Progress:
    """Counts requests and tokens; shows them in a bar if ``bar`` and in one line at the end.

    Args:
        total: requests to come, None if unknown.
        bar: draw a progress bar on stderr.
    """

    def __init__(self, *, total: int | None, bar: bool) -> None:
        self.finished = 0
        self.failed = 0
        self.tokens_in = 0
        self.tokens_out = 0
        self._start = time.monotonic()
        self._last = self._start  # when the last token came
        self._ttft = array("d")  # seconds, per request
        self._tpot = array("d")  # seconds, per request of at least two tokens
        self._bar = _bar(total) if bar else None

    def tokens(self, new: int) -> None:
        """Some request has ``new`` more tokens."""
        self.tokens_out += new
        self._last = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.tokens_out / (self._last - self._start):,.0f} tokens/s", refresh=False)
            self._bar.update(0)

    def done(self, output: RequestOutput) -> None:
        """A request is finished."""
        self.finished += 1
        self.tokens_in += len(output.prompt_token_ids)
        if output.metrics.ttft is not None:
            self._ttft.append(output.metrics.ttft)
        tpot = output.metrics.tpot(max(len(o.token_ids) for o in output.outputs))
        if tpot is not None:
            self._tpot.append(tpot)
        self._advance()

    def fail(self) -> None:
        """A request could not be run."""
        self.failed += 1
        self._advance()

    def skip(self) -> None:
        """A request was finished by an earlier run."""
        self._advance()

    @property
    def worked(self) -> bool:
        """Whether there is anything to sum up."""
        return self.finished + self.failed > 0 or self.tokens_out > 0

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bar off the screen while something else is printed there."""
        if self._bar is not None:
            self._bar.clear()
        yield
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def summary(self) -> str:
        """`3 requests in 1.2 s · 40 tokens in, 96 out · 113 tokens/s · TTFT 20 ms, TPOT 4.1 ms (median)`."""
        seconds = max(self._last - self._start, 1e-9)
        failed = f" ({self.failed:,} failed)" if self.failed else ""
        requests = self.finished + self.failed
        parts = [f"{requests:,} {'request' if requests == 1 else 'requests'}{failed} in {seconds:.2f} s"]
        parts.append(f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out")
        if self.tokens_out:
            rate = (self.tokens_in + self.tokens_out) / seconds
            parts.append(f"{rate:,.1f} tokens/s ({self.tokens_out / seconds:,.1f} out)")
        medians = [
            f"{name} {statistics.median(values) * 1e3:.1f} ms"
            for name, values in (("TTFT", self._ttft), ("TPOT", self._tpot))
            if values
        ]
        if medians:
            parts.append(f"{', '.join(medians)} (median)")
        return " · ".join(parts)

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)


def _bar(total: int | None) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc,unused-ignore]
        monitor_interval = 0  # no thread that redraws stalled bars

    return Bar(total=total, unit=" requests", file=sys.stderr, dynamic_ncols=True, smoothing=0.1, mininterval=0.2)
