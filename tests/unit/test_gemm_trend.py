"""What a GEMM takes between the rows that were measured: along its trend, held against other measurements."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from nf.kernels.gemm import TABLE
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning.gemm_trend import gemm_trend
from nf.planning.profile import Profile, ProfileKey, Solo

KEY = ProfileKey("a GPU", "1", "x")
SMS = 132
MODEL = declare(shape("llama-3-8b"))
PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
KNOTS = (256, 512, 1024, 2048)


def profile_of(points: dict[int, float], operation: str = "gate_up_proj") -> Profile:
    profile = Profile(KEY, "m", SMS)
    for rows, seconds in points.items():
        profile.add(Solo(operation, rows, "all", 0, seconds, 700 * seconds))
    return profile


def test_between_measured_rows_time_follows_the_trend_and_at_them_the_measurement() -> None:
    profile = profile_of({128: 1.0, 512: 6.0})
    assert profile.cost("gate_up_proj", 256).seconds == pytest.approx(1 + 5 / 3)
    profile.trend["gate_up_proj", "all"] = (1.0, 1.0, 2.0, 3.0)
    seconds = {rows: profile.cost("gate_up_proj", rows).seconds for rows in (64, 128, 200, 256, 384, 512, 1024)}
    # Measured over trend: 1 at 128 rows, 2 at 512, linear in between.
    assert seconds == pytest.approx(
        {64: 1.0, 128: 1.0, 200: 1 + 72 / 384, 256: 1 + 1 / 3, 384: 2 * (1 + 2 / 3), 512: 6.0, 1024: 12.0}
    )
    assert profile.cost("gate_up_proj", 384).joules == pytest.approx(700 * seconds[384])


def test_a_trend_that_ends_too_soon_is_left_out() -> None:
    profile = profile_of({128: 1.0, 512: 4.0})
    profile.trend["gate_up_proj", "all"] = (1.0, 1.0, 1.0)
    assert profile.cost("gate_up_proj", 256).seconds == pytest.approx(2.0)


def test_a_trend_is_kept_with_the_profile() -> None:
    profile = profile_of({128: 1.0, 512: 4.0})
    profile.trend = {("gate_up_proj", "all"): (1.0, 1.5), ("gate_up_proj", 112): (1.0, 2.0, 2.5)}
    data = json.loads(json.dumps(profile.to_json()))
    assert Profile.from_json(KEY, "m", data).trend == profile.trend
    data["trend"][0][2] = 0
    with pytest.raises(ValueError, match="the trend of 'gate_up_proj' must be above 0"):
        Profile.from_json(KEY, "m", data)
    del data["trend"]  # profiles of before have none
    assert Profile.from_json(KEY, "m", data).trend == {}


def test_dense_products_have_a_trend_up_to_their_largest_batch() -> None:
    points = [(o.name, rows, sms, 0) for o in MODEL.operations for rows in (256, 2048) for sms in ("all", 112)]
    trend = gemm_trend(MODEL, points, SMS)
    assert set(trend) == {(name, sms) for name in PRODUCTS for sms in ("all", 112)}
    for steps in trend.values():
        assert len(steps) == 2048 // 128
        assert steps[0] == 1.0
        assert 8 < steps[-1] < 20  # 16 times the work of the first
    assert trend["gate_up_proj", "all"] != trend["gate_up_proj", 112]  # 112 columns of tiles are whole rounds there
    mixtral = declare(shape("mixtral-8x7b"))
    names = {name for name, _ in gemm_trend(mixtral, [(o.name, 512, "all", 0) for o in mixtral.operations], SMS)}
    assert names == {"qkv_proj", "o_proj"}


def measured() -> dict[str, dict[int, float]]:
    """Microseconds of Llama-3-8B's products on the whole GPU by rows, as scripts/tune_gemm.py measured them."""
    found: dict[str, dict[int, float]] = {}
    for entry in json.loads(TABLE.read_text())["entries"]:
        if entry["model"] == "llama-3-8b" and entry["sms"] == SMS and "us" in entry:
            found.setdefault(entry["name"] + "_proj", {})[entry["rows"]] = entry["us"]
    return found


def test_the_trend_foretells_batch_sizes_that_were_not_measured_better_than_a_line() -> None:
    errors: dict[bool, list[float]] = {False: [], True: []}
    for name in PRODUCTS:
        us = measured()[name]
        profile = profile_of({rows: us[rows] for rows in KNOTS}, name)
        between = [rows for rows in us if KNOTS[0] < rows < KNOTS[-1] and rows not in KNOTS]
        assert len(between) >= 5
        for with_trend in errors:
            profile.trend = gemm_trend(MODEL, profile.solos, SMS) if with_trend else {}
            errors[with_trend] += [profile.cost(name, rows).seconds / us[rows] - 1 for rows in between]
    assert mean(map(abs, errors[True])) < 0.03 < 0.04 < mean(map(abs, errors[False]))
    assert abs(mean(errors[True])) < 0.01 < 0.03 < -mean(errors[False])  # a line is too optimistic
