"""Latencies of finished requests, and their percentiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nf.errors import NfError
from nf.outputs import RequestOutput

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Times:
    """Of one request, in seconds.

    Args:
        ttft: from arrival to the first token.
        tpot: per output token after the first; None if there is only one.
        latency: from arrival to the last token.
        output_tokens: how many there are.
    """

    ttft: float
    tpot: float | None
    latency: float
    output_tokens: int

    @property
    def normalized_latency(self) -> float:
        """Latency per output token."""
        return self.latency / self.output_tokens


def times(output: RequestOutput, arrival: float | None = None) -> Times:
    """Times of a finished request of one continuation.

    Args:
        output: of the request.
        arrival: when it should have been made, if that counts rather than when it was; seconds, monotonic clock.

    Raises:
        NfError: the request failed, so the benchmark says nothing.
    """
    (completion,) = output.outputs
    metrics, count = output.metrics, len(completion.token_ids)
    if completion.finish_reason != "length" or metrics.first_token_time is None or metrics.finished_time is None:
        reason = output.error or f"it ended with {completion.finish_reason!r} after {count} tokens"
        raise NfError(f"request {output.request_id} did not run to its full length: {reason}")
    start = metrics.arrival_time if arrival is None else arrival
    return Times(metrics.first_token_time - start, metrics.tpot(count), metrics.finished_time - start, count)


def summary(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles (linear between ranks) of the values that are there; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": float(np.mean(known))} | {
        f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(known, PERCENTILES), strict=True)
    }


def summaries(all_times: Sequence[Times]) -> dict[str, dict[str, float] | None]:
    """Seconds: TTFT, TPOT, latency and latency per output token."""
    return {
        "ttft": summary(t.ttft for t in all_times),
        "tpot": summary(t.tpot for t in all_times),
        "latency": summary(t.latency for t in all_times),
        "normalized_latency": summary(t.normalized_latency for t in all_times),
    }
