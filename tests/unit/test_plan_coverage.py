"""Which plan is for which steps: the loads that plans of a search are stored with, and what an engine makes of them."""

from __future__ import annotations

import math

import pytest
from fake_profile import MODEL, SMS, FormulaBench, formula_profile
from test_search import MIXES, OPERATIONS, TableBench, by_load, names, without_profile

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.graphs.plan import sequential_plan, validate
from nf.graphs.pool import ALIKE, GraphPool, step_plans
from nf.planning.coverage import AS_MEASURED, FEWEST_KEYS, MOST_KEYS, _apart, _best_at, _bias, _grid, covering_plans
from nf.planning.loads import batch_shape, made_for
from nf.planning.nano_layer import BatchShape
from nf.planning.predict import Prediction, of_plan
from nf.planning.search import Candidate, Result, Search, search

TWO = [without_profile()[0], without_profile()[2]]


def test_what_is_stored_runs_the_steps_that_it_won() -> None:
    """From the search to the engine: sequential where it was the fastest, the others around their loads."""
    found = search(without_profile(MIXES), MIXES, TableBench(by_load))
    chosen = covering_plans(found, MODEL, None, 1)
    assert [plan.loads for plan in chosen] == [(made_for(load),) for load in MIXES]
    for plan in chosen:
        validate(plan, OPERATIONS, gpu_sms=SMS)
    steps = step_plans([sequential_plan(OPERATIONS, 4096), *chosen], OPERATIONS)
    pool = GraphPool([(step, step) for step in steps])  # type: ignore[misc]
    for load, name in zip(MIXES, names(found), strict=True):
        for decode_tokens in range(load.num_decode - 100, load.num_decode + 100, 20):
            step, _ = pool.find(2048, decode_tokens, decode_tokens * batch_shape(load).decode_context)
            assert (step.plan.name, step.plan.dense_batch_size) == (name, 2048)


def test_every_load_is_of_one_plan_and_close_to_several_measured_ones_the_nearest_counts() -> None:
    """Loads asked for twice, or a step apart, may have different winners; plans are kept by their first load."""
    twins = [Load(2048, 1024, 512), Load(2048, 1020, 516), Load(2048, 1024, 512)]
    tokens = [made_for(load)[0] for load in twins]
    assert tokens[0] < tokens[1] < tokens[0] * AS_MEASURED
    results = [Result(candidate, (Measurement(1.0, 1.0),) * 3) for candidate in without_profile(twins)]
    found = Search(tuple(twins), tuple(results), (results[2], results[3], results[0]))
    for profile in (None, formula_profile(bench=FormulaBench(kept=0.99, speed=0.97))):
        plans = covering_plans(found, MODEL, profile, 900_000)
        owned = [load for plan in plans for load in plan.loads]
        assert len(owned) == len(set(owned))
        owners = {load: plan.name for plan in plans for load in plan.loads}
        assert [owners[made_for(load)] for load in twins[:2]] == [r.candidate.plan.name for r in found.best[:2]]
    below = found.loads[1].num_decode * 1.08, found.loads[0].num_decode / 1.08
    for place, best in zip(below, found.best[1::-1], strict=True):
        assert _best_at((round(place), 1280), found, MODEL, formula_profile()) == best


@pytest.mark.parametrize("size", [2, 8, 256, 640, 1024, 2048, 4096])
def test_no_full_step_with_a_twentieth_or_more_that_decode_is_far_from_the_grid(size: int) -> None:
    """Up to what the KV cache holds, however it is shared out; no load of the grid has no decode token."""
    room = 900_000
    grid = list(_grid(size, room))
    assert all(1 <= tokens <= size and keys >= 1 for tokens, keys in grid)
    for tokens in range(max(1, -(-size // 20)), size + 1, max(1, size // 50)):
        keys = FEWEST_KEYS
        while tokens * keys <= room and keys <= MOST_KEYS:
            assert min(_apart((tokens, keys), place) for place in grid) <= ALIKE or tokens < 8, (tokens, keys)
            keys = int(keys * 1.07) + 1


def test_between_the_loads_the_profile_says_which_plan_is_for_a_step() -> None:
    """Every step of the grid has one; at a measured load it is the one that won, elsewhere the one predicted to."""
    profile = formula_profile(bench=FormulaBench(kept=0.99, speed=0.97))
    found = search(without_profile(MIXES), MIXES, TableBench(by_load))
    plans = covering_plans(found, MODEL, profile, 400_000)
    assert {plan.name for plan in plans} == set(names(found))
    owners = {load: plan for plan in plans for load in plan.loads}
    assert len(owners) == sum(len(plan.loads) for plan in plans) > 100
    for plan in plans:
        validate(plan, OPERATIONS, gpu_sms=SMS)
    by_name = {result.candidate.plan.name: result.candidate.plan for result in found.best}
    for (tokens, keys), owner in owners.items():
        assert tokens * keys <= 400_000 or (tokens, keys) in map(made_for, MIXES)
        near = [
            name
            for load, name in zip(MIXES, names(found), strict=True)
            for own, context in [made_for(load)]
            if max(abs(math.log(tokens / own)), abs(math.log(tokens * keys / own / context))) <= math.log(AS_MEASURED)
        ]
        shape = BatchShape(2048, tokens, keys, max(1, keys // 2))
        times = {name: of_plan(plan, MODEL, profile, shape) for name, plan in by_name.items()}
        seconds = {name: time.seconds for name, time in times.items() if time is not None}
        fastest = min(seconds, key=lambda name: seconds[name])
        assert owner.name in (near or [fastest, "sequential"])
        if not near and owner.name == "sequential":
            assert seconds[fastest] > seconds["sequential"] * 0.98
    assert [plan.loads for plan in covering_plans(found, MODEL, None, 400_000)] == [(made_for(m),) for m in MIXES]


def test_predictions_are_set_right_by_how_far_off_they_were_nearby() -> None:
    """A plan predicted to gain 5 % everywhere, which it did at the second load and not at the third."""
    sequential, plan = (
        Candidate(each.plan, each.kind, (Prediction(seconds, 1.0),) * 3)
        for each, seconds in zip(TWO, (1.0, 0.95), strict=True)
    )
    base = Result(sequential, (Measurement(1.0, 1.0),) * 3)
    off = Result(plan, tuple(Measurement(seconds, 1.0) for seconds in (1.0, 0.95, 1.05)))
    assert _bias(base, {0: 0.5, 1: 0.3, 2: 0.4}) == 1
    assert _bias(off, {0: 9.0, 1: 0.05, 2: 9.0}) == pytest.approx(1.0, abs=1e-3)
    assert _bias(off, {0: 9.0, 1: 9.0, 2: 0.05}) == pytest.approx(1.05 / 0.95, abs=1e-3)
    assert _bias(off, {1: 0.2, 2: 0.2}) == pytest.approx((1 + 1.05 / 0.95) / 2)
    unknown = Result(Candidate(plan.plan, plan.kind, (None,) * 3), off.measured)
    assert _bias(unknown, {0: 0.1, 1: 0.1, 2: 0.1}) == 1
