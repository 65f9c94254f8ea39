"""What ``nf plan search`` found, as a table for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def table(result: dict[str, Any]) -> Iterator[str]:
    """A search's record for people: a table per load with what was chosen."""
    measured = any(load["chosen"] is not None for load in result["loads"])
    where = f"on {result['gpu']}" if "gpu" in result else f"predicted ({result['profile']})"
    yield f"{result['model']} {where}, {result['dense_batch_size']:,} tokens per step"
    width = max(len(plan["name"]) for plan in result["plans"])
    columns = _MEASURED if measured else _PREDICTED
    for number, load in enumerate(result["loads"]):
        yield ""
        yield f"{load['input_len']} in, {load['output_len']} out: {load['decode_tokens']:,} decode tokens per step"
        yield f"  {'plan':<{width}}" + "".join(f"{head:>{size}}" for head, size, *_ in columns)
        for plan in result["plans"]:
            if plan["error"]:
                yield f"  {plan['name']:<{width}}  {plan['error']}"
                continue
            own = plan["loads"][number]
            cells = ((_number(own[key], scale, digits, unit), size) for _, size, key, scale, digits, unit in columns)
            yield f"  {plan['name']:<{width}}" + "".join(f"{text:>{size}}" for text, size in cells)
        if (bound := load["predicted_bound_s"]) is not None:
            best = min(p["loads"][number]["predicted_s"] or math.inf for p in result["plans"])
            yield (
                f"  by the profile no plan takes less than {1e3 * bound:,.2f} ms; "
                f"the best of these is {100 * (best / bound - 1):.1f} % above"
            )
        if measured:
            yield _verdict(load)
    if (error := result["median_prediction_error"]) is not None:
        yield ""
        yield f"predictions were off by {100 * error:.1f} % (median)"
    for path in result.get("stored", ()):
        yield f"kept in {path}"


Columns = tuple[tuple[str, int, str, float, int, str], ...]
# Head, width, key in a plan's record of a load, and how it is printed: scale, digits, unit.
_MEASURED: Columns = (
    ("predicted", 12, "predicted_s", 1e3, 2, " ms"),
    ("measured", 12, "measured_s", 1e3, 2, " ms"),
    ("error", 9, "prediction_error", 100, 1, " %"),
    ("predicted", 12, "predicted_j", 1, 1, " J"),
    ("measured", 11, "measured_j", 1, 1, " J"),
    ("tokens/s", 11, "tokens_per_s", 1, 0, ""),
    ("mJ/token", 10, "j_per_token", 1e3, 2, ""),
    ("speed-up", 10, "speed_up", 1, 3, ""),
)
_PREDICTED: Columns = (
    ("time", 12, "predicted_s", 1e3, 2, " ms"),
    ("energy", 12, "predicted_j", 1, 1, " J"),
    ("speed-up", 10, "predicted_speed_up", 1, 3, ""),
)


def _verdict(load: dict[str, Any]) -> str:
    from nf.planning.search import SEQUENTIAL, WORTH

    if load["chosen"] == SEQUENTIAL:
        return f"  fastest: sequential; no other plan is faster by more than {100 * WORTH:g} %"
    return f"  fastest: {load['chosen']}, {100 * (load['speed_up'] - 1):.1f} % over sequential"


def _number(value: float | None, scale: float, digits: int, unit: str) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}{unit}"
