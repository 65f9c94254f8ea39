"""Profiles as data: what is stored comes back, what lies between is interpolated, what is beaten is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import example_profile

from nf.errors import InputError
from nf.planning.interference import A100_PUBLISHED, CurvePoint, curve, published, without_dominated
from nf.planning.profile import CoRun, Profile, ProfileKey, Side, Solo
from nf.planning.profile_file import load_profile, save_profile

ROOT = Path(__file__).parents[2]
KEY = ProfileKey("NVIDIA H200", "580.159", "0.1.0+abc")


def profile(*points: Solo | CoRun, model: str = "8B") -> Profile:
    made = Profile(KEY, model, 132, 126.0, 700.0)
    for point in points:
        made.add(point)
    return made


def line(rows: int, seconds: float, *, sms: int | str = "all", context: int = 0) -> Solo:
    return Solo("o_proj", rows, sms, context, seconds, 700 * seconds)  # type: ignore[arg-type]


def test_saved_points_come_back_beside_those_of_other_models(tmp_path: Path) -> None:
    co_run = CoRun(Side("o_proj", 128, 116, 0, 2e-5), Side("decode_attention", 128, 16, 1024, 3e-5), 690.5)
    first = profile(line(128, 1e-5), Solo("rope_append", 256, 16, 0, 1.25e-6, math.nan), co_run)
    second = profile(line(256, 2e-5), model="70B TP 4")
    path = save_profile(tmp_path, first)
    assert save_profile(tmp_path, second) == path == tmp_path / "nvidia-h200-580.159-0.1.0-abc.json"
    back = load_profile(tmp_path, KEY, "8B")
    assert back is not None
    assert back.co_runs == first.co_runs
    assert back.solos["o_proj", 128, "all", 0] == line(128, 1e-5)
    assert math.isnan(back.solos["rope_append", 256, 16, 0].joules)
    assert (back.gpu_sms, back.idle_watts, back.cap_watts) == (132, 126.0, 700.0)
    assert load_profile(tmp_path, KEY, "70B TP 4") == second
    assert load_profile(tmp_path, KEY, "unknown") is None
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_measurement_goes_on_where_it_stopped(tmp_path: Path) -> None:
    wanted = [("o_proj", rows, "all", 0) for rows in (128, 256, 384)]
    save_profile(tmp_path, profile(line(256, 2e-5)))
    resumed = load_profile(tmp_path, KEY, "8B")
    assert resumed is not None
    assert resumed.missing(wanted) == [wanted[0], wanted[2]]  # type: ignore[arg-type]
    resumed.add(line(256, 3e-5))  # measured again: the newer one counts
    assert resumed.cost("o_proj", 256).seconds == 3e-5


def test_a_file_that_is_damaged_or_of_another_gpu_is_refused(tmp_path: Path) -> None:
    path = save_profile(tmp_path, profile(line(128, 1e-5)))
    document = json.loads(path.read_text())
    own = document["models"]["8B"]
    for broken in (
        "{",
        "[" * 100_000,
        "[]",
        json.dumps(document | {"version": 2}),
        json.dumps(document | {"driver": "1"}),
        *(
            json.dumps(document | {"models": {"8B": model}})
            for model in (
                {"solo": {}},
                own | {"solo": []},
                own | {"solo": {"o_proj": [[128, "all", 0]]}},
                own | {"solo": {"o_proj": [[128, "half", 0, 1e-5, 1.0]]}},
                own | {"solo": {"o_proj": [[128, 133, 0, 1e-5, 1.0]]}},
                own | {"solo": {"o_proj": [["128", "all", 0, 1e-5, 1.0]]}},
                own | {"solo": {"o_proj": [[128, "all", None, 1e-5, 1.0]]}},
                own | {"solo": {"o_proj": [[128, "all", 0, 1e-5, -1.0]]}},
                own | {"solo": {"o_proj": [[128, "all", 0, math.inf, 1.0]]}},
                own | {"gpu_sms": "132"},
                own | {"cap_watts": 100.0},
                own | {"idle_watts": "126"},
            )
        ),
    ):
        path.write_text(broken)
        with pytest.raises(InputError, match=path.name):
            load_profile(tmp_path, KEY, "8B")


def test_points_must_be_measurements() -> None:
    for rows, seconds in ((0, 1e-5), (128, 0.0), (128, math.nan)):
        with pytest.raises(ValueError, match="above 0"):
            profile(line(rows, seconds))


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.integers(1, 32), st.floats(1e-6, 1e-3), min_size=1, max_size=6), st.integers(1, 40 * 128))
def test_between_measured_rows_time_is_linear(times: dict[int, float], rows: int) -> None:
    measured = {128 * chunk: seconds for chunk, seconds in times.items()}
    got = profile(*(line(count, seconds) for count, seconds in measured.items())).cost("o_proj", rows)
    below = max((count for count in measured if count <= rows), default=None)
    above = min((count for count in measured if count >= rows), default=None)
    if below is None:
        want = measured[min(measured)]
    elif above is None:
        want = measured[below] / below * rows
    elif below == above:
        want = measured[below]
    else:
        weight = (rows - below) / (above - below)
        want = (1 - weight) * measured[below] + weight * measured[above]
    assert got.seconds == pytest.approx(want)
    assert got.joules == pytest.approx(700 * want)


def test_between_sm_counts_speed_is_linear_and_context_scales() -> None:
    made = profile(
        *(line(128, 8e-5 / n, sms=16 * n) for n in (1, 2, 4)),
        line(128, 1e-5),
        *(Solo("decode_attention", 128, "all", context, context * 1e-8, 0.0) for context in (512, 1024)),
    )
    assert made.cost("o_proj", 128, 48).seconds == pytest.approx(8e-5 / 3)
    assert made.cost("o_proj", 128, 8).seconds == pytest.approx(16e-5)
    assert made.cost("o_proj", 128, 132) == made.cost("o_proj", 128)
    assert made.cost("decode_attention", 128, "all", 768).seconds == pytest.approx(768e-8)
    assert made.cost("decode_attention", 128, "all", 2048).seconds == pytest.approx(2048e-8)
    assert made.cost("decode_attention", 32, "all", 512).seconds == pytest.approx(128e-8)  # no tile to fill
    assert made.cost("decode_attention", 0).seconds == 0
    with pytest.raises(InputError, match="gate_up_proj"):
        made.cost("gate_up_proj", 128)


def test_a_curve_is_the_mean_of_its_pairs_by_length() -> None:
    def pair(rows: int, kept: float, speed: float, sms: int | str) -> CoRun:
        compute = 116 if sms == 16 else "all"
        first = Side("o_proj", rows, compute, 0, rows * 1e-7 / kept)  # type: ignore[arg-type]
        return CoRun(first, Side("decode_attention", rows, sms, 0, rows * 1e-7 / speed), 650.0)  # type: ignore[arg-type]

    made = profile(
        *(Solo(name, 1024, "all", 0, 1024e-7, 0.0) for name in ("o_proj", "decode_attention")),
        Solo("o_proj", 1024, 116, 0, 1024e-7 / 0.9, 0.0),
        *(pair(rows, kept, speed, 16) for rows, kept, speed in ((1024, 0.7, 0.5), (2048, 0.8, 0.6))),
        pair(1024, 0.6, 0.9, "all"),
    )
    shared, partition = sorted(curve(made, ["o_proj"], ["decode_attention"]), key=lambda p: str(p.sms), reverse=True)
    assert (shared.kept, shared.speed, shared.kept_in_partition) == pytest.approx((0.6, 0.9, 0.6))
    assert (partition.kept, partition.speed) == pytest.approx(((0.7 + 2 * 0.8) / 3, (0.5 + 2 * 0.6) / 3))
    assert partition.share == pytest.approx(1 - partition.kept)
    assert partition.kept_in_partition == pytest.approx(partition.kept / 0.9)
    assert partition.spread == pytest.approx(0.05)
    assert curve(made, ["qkv_proj"], ["decode_attention"]) == ()


POINTS = st.builds(
    lambda kept, speed, watts: CurvePoint("all", kept, speed, kept, speed, watts),
    st.integers(1, 5).map(lambda n: n / 5),
    st.integers(1, 5).map(lambda n: n / 5),
    st.sampled_from([500.0, 600.0, 700.0]),
)


@settings(deadline=None)
@given(st.lists(POINTS, max_size=8, unique=True))
def test_dominated_points_are_dropped_and_no_others(points: list[CurvePoint]) -> None:
    def beaten(p: CurvePoint) -> bool:
        return any(q.kept >= p.kept and q.speed >= p.speed and q.watts <= p.watts for q in points if q != p)

    left = without_dominated(points)
    assert set(left) == {point for point in points if not beaten(point)}
    assert [p.share for p in left] == sorted(p.share for p in left)


def test_published_curves_grow_and_reject_nonsense() -> None:
    for points in A100_PUBLISHED.values():
        assert [p.speed for p in points] == sorted(p.speed for p in points)
        assert all(p.speed > p.share for p in points)  # that is why overlapping pays on an A100
    with pytest.raises(InputError, match="interference"):
        published({0.5: 1.5})


def test_the_example_is_what_it_says_it_is(tmp_path: Path) -> None:
    """docs/examples/a100-nanoflow.json comes from ``example_profile``; save_profile wrote it."""
    written = save_profile(tmp_path, example_profile())
    assert written.read_text() == (ROOT / "docs" / "examples" / "a100-nanoflow.json").read_text()
