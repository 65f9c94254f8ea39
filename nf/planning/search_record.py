"""A search as plain data: what ``--json`` prints and what lies beside a stored plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nf.bench.measure import Measurement
from nf.planning.predict import Prediction
from nf.planning.search import Result, Search


def record(found: Search, bounds: Sequence[float | None], head: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain data: seconds, joules, tokens.

    Args:
        bounds: see ``bounds``.
        head: what was measured on.
    """
    loads = [
        {
            "input_len": load.input_len,
            "output_len": load.output_len,
            "decode_tokens": load.num_decode,
            "predicted_bound_s": bound,
            "chosen": best.candidate.plan.name if best.measured else None,
            "speed_up": 1 / best.ratio(found.sequential, number) if best.measured else None,
        }
        for number, (load, bound, best) in enumerate(zip(found.loads, bounds, found.best, strict=True))
    ]
    return {
        **head,
        "dense_batch_size": found.loads[0].dense_batch_size,
        "loads": loads,
        "median_prediction_error": _number(found.median_error),
        "plans": [_plan_record(result, found) for result in found.results],
    }


def _plan_record(result: Result, found: Search) -> dict[str, Any]:
    candidate, base = result.candidate, found.sequential
    nothing = (None,) * len(found.loads)
    columns = (
        candidate.predicted,
        result.measured or nothing,
        base.candidate.predicted,
        base.measured or nothing,
    )
    tokens = found.loads[0].dense_batch_size
    return {
        "name": candidate.plan.name,
        "kind": candidate.kind,
        "nano_operations": sum(len(stream.nano_operations) for stream in candidate.plan.streams),
        "error": result.error or None,
        "loads": [_load_record(tokens, *values) for values in zip(*columns, strict=True)],
    }


def _load_record(
    tokens: int,
    predicted: Prediction | None,
    measured: Measurement | None,
    base_predicted: Prediction | None,
    base_measured: Measurement | None,
) -> dict[str, float | None]:
    def ratio(one: Prediction | Measurement | None, other: Prediction | Measurement | None) -> float | None:
        return None if one is None or other is None else one.seconds / other.seconds

    error = ratio(predicted, measured)
    return {
        "predicted_s": None if predicted is None else predicted.seconds,
        "predicted_j": None if predicted is None else _number(predicted.joules),
        "predicted_speed_up": ratio(base_predicted, predicted),
        "measured_s": None if measured is None else measured.seconds,
        "measured_j": None if measured is None else _number(measured.joules),
        "tokens_per_s": None if measured is None else tokens / measured.seconds,
        "j_per_token": None if measured is None else _number(measured.joules / tokens),
        "prediction_error": None if error is None else error - 1,
        "speed_up": ratio(base_measured, measured),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
