"""Filling a profile: what is measured, in which order it is kept, and that an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_profile import KEY, MODEL, SMS, FormulaBench, formula_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.errors import InputError
from nf.graphs.builtin import lane_of
from nf.kernels.device import CudaError
from nf.models.operations import Rows
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning import profiling as module
from nf.planning.gpu_bench import RUN_SECONDS
from nf.planning.profile import Cost, Profile, SoloKey
from nf.planning.profile_file import load_profile, read_profile, save_profile
from nf.planning.profiling import (
    ENDS,
    FULL_SECONDS,
    QUICK_SECONDS,
    Filled,
    fill,
    full_extent,
    missing_points,
    quick_extent,
    wanted_pairs,
    wanted_points,
    wanted_solos,
    words,
)
from nf.planning.resources import arrangements
from nf.planning.steady_replays import WARM_SECONDS

EXTENT = quick_extent(2048, SMS)


def new_profile() -> Profile:
    return Profile(KEY, "llama", SMS)


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b"])
@pytest.mark.parametrize("extent", [quick_extent, full_extent])
def test_every_operation_is_measured_where_plans_can_put_it(name: str, extent: object) -> None:
    operations = declare(shape(name)).operations
    where = extent(2048, SMS)  # type: ignore[operator]
    solos = wanted_solos(operations, where)
    assert len(set(solos)) == len(solos)
    assert {key[0] for key in solos} == {operation.name for operation in operations} | {ENDS}
    by_name = {operation.name: operation for operation in operations}
    for name_, rows, sms, context in solos:
        assert 1 <= rows <= 2048
        assert sms == "all" or 0 < sms < SMS
        if name_ != ENDS:
            assert (context > 0) == (by_name[name_].rows is not Rows.ALL)
    for operation in operations:  # the whole GPU, the whole batch, and a partition
        places = {key[2] for key in solos if key[0] == operation.name}
        assert "all" in places
        assert len(places) > 2
    pairs = wanted_pairs(operations, where)
    assert all((a[2], b[2]) == ("all", "all") or a[2] + b[2] == SMS for a, b in pairs)
    assert {lane_of(by_name[b[0]]) for _, b in pairs} == {"memory"}


def test_the_full_extent_goes_in_steps_of_128_rows_and_4_sms() -> None:
    extent = full_extent(2048, SMS)
    assert extent.rows == tuple(range(128, 2049, 128))
    assert extent.memory_sms == (8, 12, 16, 20, 24, 28, 32, 48)
    assert extent.compute_sms == tuple(SMS - sms for sms in extent.memory_sms)
    assert quick_extent(2048, SMS).rows == (256, 512, 1024, 2048)


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2-7b", "mixtral-8x7b"])
def test_the_limits_suffice_for_warming_up_and_measuring(name: str) -> None:
    operations, point = declare(shape(name)).operations, WARM_SECONDS + RUN_SECONDS
    assert point * len(wanted_points(operations, quick_extent(2048, SMS))) < QUICK_SECONDS
    assert point * len(wanted_points(operations, full_extent(2048, SMS))) < FULL_SECONDS


@given(tokens=st.integers(1, 8192), sms=st.integers(1, 160))
@settings(max_examples=60, deadline=None)
def test_any_batch_and_gpu_has_an_extent(tokens: int, sms: int) -> None:
    for extent in (quick_extent(tokens, sms), full_extent(tokens, sms)):
        keys = wanted_solos(MODEL.operations, extent)
        assert all(0 < key[1] <= tokens and (key[2] == "all" or 0 < key[2] < sms) for key in keys)
        assert max(key[1] for key in keys) > tokens - 128
        assert wanted_pairs(MODEL.operations, extent)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    bench, told = FormulaBench(fails_after=30), list[str]()
    profile = new_profile()
    with pytest.raises(RuntimeError, match="gone"):
        fill(profile, bench, MODEL.operations, EXTENT, save=lambda p: save_profile(tmp_path, p), progress=told.append)
    assert len(told) == 30
    stored = load_profile(tmp_path, KEY, "llama")
    assert stored is not None
    assert len(stored.solos) == 30
    again = FormulaBench()
    wanted = len(wanted_solos(MODEL.operations, EXTENT)) + len(wanted_pairs(MODEL.operations, EXTENT))
    assert missing_points(stored, MODEL.operations, EXTENT).count == wanted - 30
    filled = fill(stored, again, MODEL.operations, EXTENT, save=lambda p: save_profile(tmp_path, p))
    assert filled == Filled(measured=wanted - 30, known=30, left=0)
    assert not set(again.measured) & set(bench.measured)
    read = read_profile(tmp_path / KEY.file_name, "llama")
    assert (read.solos.keys(), read.co_runs.keys()) == (stored.solos.keys(), stored.co_runs.keys())
    assert fill(stored, again, MODEL.operations, EXTENT, save=pytest.fail) == Filled(0, wanted, 0)


def test_when_time_is_up_the_rest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, saves = [0.0], list[int]()
    monkeypatch.setattr(module, "monotonic", lambda: now[0])

    def progress(_: str) -> None:
        now[0] += 1.0

    profile = new_profile()
    filled = fill(
        profile,
        FormulaBench(),
        MODEL.operations,
        EXTENT,
        save=lambda p: saves.append(len(p.solos)),
        seconds=20,
        progress=progress,
    )
    assert filled.measured == 20
    assert filled.left > 100
    assert saves == [*range(2, 20, 2), 20, 20]  # every second or so, and at the end


def test_what_an_interrupted_run_has_suffices_for_the_first_places() -> None:
    points = wanted_points(MODEL.operations, EXTENT)
    assert sorted(map(str, points)) == sorted(
        map(str, [*wanted_solos(MODEL.operations, EXTENT), *wanted_pairs(MODEL.operations, EXTENT)])
    )
    for complete, sms in enumerate(EXTENT.memory_sms):
        profile = new_profile()
        first = next(i for i, point in enumerate(points) if len(point) == 4 and point[2] in (sms, SMS - sms))
        fill(profile, _Stops(first), MODEL.operations, EXTENT, save=lambda _: None)
        names = [arrangement.name for arrangement in arrangements(profile, MODEL.operations, dominated=True)]
        assert names == ["co-resident", *(f"{before} SMs for memory" for before in EXTENT.memory_sms[:complete])]


class _Stops(FormulaBench):
    """Measures so many points and refuses the rest."""

    def __init__(self, points: int) -> None:
        super().__init__()
        self.points = points

    def _count(self, _: object) -> None:
        self.points -= 1
        if self.points < 0:
            raise CudaError("no more")


def test_a_point_that_cannot_be_measured_is_told_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(FormulaBench):
        def _count(self, point: object) -> None:
            if "16" in str(point):
                raise InputError("sms", "this GPU cannot give a partition of 16 SMs")

    profile, told = new_profile(), list[str]()
    points = missing_points(profile, MODEL.operations, EXTENT).points
    filled = fill(profile, Refusing(), MODEL.operations, EXTENT, save=lambda _: None, progress=told.append)
    left = missing_points(profile, MODEL.operations, EXTENT).points
    assert (filled.failed, filled.left) == (len(left), 0)
    assert len(left) > 0
    assert told == [words(point) for point in points]  # failed ones are behind us as well
    assert all("16" in str(point) for point in left)
    assert "16 SMs" in caplog.text
    with pytest.raises(CudaError, match="no more"):
        fill(new_profile(), _Stops(0), MODEL.operations, EXTENT, save=pytest.fail)


def test_a_gpu_that_is_gone_ends_the_run_and_what_there_was_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    class Dies(_Stops):
        @property
        def broken(self) -> bool:  # type: ignore[override]
            return self.points < 0

    bench, saves = Dies(30), list[int]()
    with pytest.raises(CudaError, match="no more"):
        fill(new_profile(), bench, MODEL.operations, EXTENT, save=lambda p: saves.append(len(p.solos)))
    assert (bench.points, saves) == (-1, [30])  # no further point was tried
    assert caplog.text == ""


def test_a_time_of_nothing_is_a_point_that_failed_and_a_mistake_in_the_bench_is_one_of_ours() -> None:
    class Nothing(FormulaBench):
        def solo(self, key: SoloKey) -> Cost:
            return Cost(0.0, 0.0) if key[1] == 512 else super().solo(key)

    filled = fill(new_profile(), Nothing(), MODEL.operations, EXTENT, save=lambda _: None)
    assert filled.failed > 0
    assert filled.left == 0

    class Wrong(FormulaBench):
        def solo(self, key: SoloKey) -> Cost:
            raise ValueError(f"no such shape: {key}")

    with pytest.raises(ValueError, match="no such shape"):
        fill(new_profile(), Wrong(), MODEL.operations, EXTENT, save=pytest.fail)


def test_a_filled_profile_is_all_that_the_search_needs() -> None:
    profile = formula_profile()
    names = {arrangement.name for arrangement in arrangements(profile, MODEL.operations)}
    assert "co-resident" in names
    assert "24 SMs for memory" in names
    for rows in (100, 333, 2048):
        for operation in MODEL.operations:
            assert profile.cost(operation.name, rows, "all", 700).seconds > 0


def test_a_profile_file_without_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such profile file"):
        read_profile(tmp_path / "none.json", "llama")
    path = save_profile(tmp_path, formula_profile())
    with pytest.raises(ValueError, match="has no measurements of qwen, only of llama-32l"):
        read_profile(path, "qwen")
