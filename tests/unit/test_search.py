"""The search's last stage with a measurer that is a table: the fastest plan is found, kept, and taken by engines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_profile import MODEL, SMS, FormulaBench, formula_profile

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.cli.plan_search_table import table
from nf.errors import InputError, NfError, PlanError
from nf.graphs.plan import PipelinePlan, nano_batch_plan, sequential_plan, validate
from nf.graphs.plan_store import find_plans, save_plans, shape_name
from nf.graphs.pool import GraphPool, step_plans
from nf.kernels.device import DeviceMemoryError
from nf.models.operations import Rows
from nf.planning.coverage import covering_plans
from nf.planning.gpu_step_bench import plans_for
from nf.planning.kept_steps import MeasuredOn, open_steps, read_steps
from nf.planning.loads import MOST_KEYS, DecodeShare, batch_shape, loads, made_for
from nf.planning.nano_layer import profiled_costs
from nf.planning.predict import of_plan, rounds_of
from nf.planning.profiling import ENDS
from nf.planning.resources import propose
from nf.planning.search import (
    WORTH,
    Candidate,
    Result,
    Search,
    baselines,
    bounds,
    candidates,
    search,
)
from nf.planning.search_record import record

LOAD = Load(2048, 1024, 512)
OPERATIONS = MODEL.operations


class TableBench:
    """Steps that take what a table says, in the order of measuring."""

    def __init__(self, seconds: Callable[[PipelinePlan, Load], float]) -> None:
        self.seconds, self.measured = seconds, list[str]()

    def measure(self, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        self.measured.append(plan.name)
        return [Measurement(s := self.seconds(plan, load), 690 * s) for load in loads]


def without_profile(loads_: Sequence[Load] = (LOAD,)) -> list[Candidate]:
    return candidates(MODEL, None, loads_, SMS)


def test_the_baselines_are_the_ablation_and_all_are_valid() -> None:
    plans = baselines(MODEL, 2048, SMS)
    assert [kind for _, kind in plans] == [
        "sequential",
        "nano-batches, not overlapped",
        "nano-batches, co-resident",
        "nano-batches, 20 SMs for memory",
    ]
    for plan, _ in plans:
        validate(plan, OPERATIONS, gpu_sms=SMS)
    assert len(plans[1][0].nano_batches) == 2
    assert len(plans[1][0].streams) == 1


MIXES = [Load(2048, 1400, 100), Load(2048, 700, 700), Load(2048, 300, 1000)]


def names(found: Search) -> list[str]:
    return [result.candidate.plan.name for result in found.best]


def test_the_fastest_plan_wins_is_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = TableBench(lambda plan, _: {"nano-batch": 0.9}.get(plan.name, 1.0))
    found = search(without_profile(), [LOAD], bench)
    assert [best.candidate.plan for best in found.best] == [nano_batch_plan(OPERATIONS, 2048)]
    assert bench.measured[-2:] == ["sequential", "nano-batch"]  # both were measured once more
    result = record(found, [None], {"model": "llama-3-8b", "gpu": "NVIDIA H200"})
    assert [(load["chosen"], load["speed_up"]) for load in result["loads"]] == [("nano-batch", pytest.approx(1 / 0.9))]
    json.dumps(result, allow_nan=False)
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path))
    save_plans(covering_plans(found, MODEL, None, 1), MODEL.config, "NVIDIA H200", result)
    (stored,) = (s.plan for s in find_plans(MODEL, "NVIDIA H200", 2048, gpu_sms=SMS) if s.path.is_relative_to(tmp_path))
    assert stored == replace(nano_batch_plan(OPERATIONS, 2048), loads=(made_for(LOAD),))


@pytest.mark.parametrize("gain", [0.0, WORTH / 2, -0.1])
def test_sequential_stays_unless_another_is_clearly_faster(gain: float) -> None:
    bench = TableBench(lambda p, _: 1 - gain if p.name == "nano-batch" else 1.0)
    found = search(without_profile(), [LOAD], bench)
    assert found.best == (found.sequential,)
    assert found.sequential.candidate.plan == sequential_plan(OPERATIONS, 2048)
    assert bench.measured.count("sequential") == 1  # nothing has to be told apart


def by_load(plan: PipelinePlan, load: Load) -> float:
    """Two plans win one load each, and lose much at the others; sequential is the fastest at the first."""
    winner = {MIXES[1]: "nano-batch", MIXES[2]: "nano-batch, 20 SMs for memory"}.get(load)
    return 0.9 if plan.name == winner else 1.0 if plan.name == "sequential" else 1.5


def test_each_load_has_a_winner_of_its_own() -> None:
    bench = TableBench(by_load)
    found = search(without_profile(MIXES), MIXES, bench)
    assert names(found) == ["sequential", "nano-batch", "nano-batch, 20 SMs for memory"]
    assert bench.measured[4:] == names(found)  # once more, each once
    loads = record(found, [None] * 3, {"model": "m", "gpu": "g"})["loads"]
    assert [load["chosen"] for load in loads] == names(found)
    assert [load["speed_up"] for load in loads] == pytest.approx([1, 1 / 0.9, 1 / 0.9])
    text = list(table(record(found, [None] * 3, {"model": "m", "gpu": "g"})))
    assert [line.strip() for line in text if "fastest" in line] == [
        f"fastest: sequential; no other plan is faster by more than {100 * WORTH:g} %",
        "fastest: nano-batch, 11.1 % over sequential",
        "fastest: nano-batch, 20 SMs for memory, 11.1 % over sequential",
    ]


def test_a_plan_that_won_no_load_may_win_one_by_the_second_measurement() -> None:
    """Means of both decide, among those that were measured twice."""
    late = {("nano-batch", MIXES[0]): iter([1.0, 0.9])}

    def seconds(plan: PipelinePlan, load: Load) -> float:
        return next(late.get((plan.name, load), iter([by_load(plan, load)])))

    found = search(without_profile(MIXES), MIXES, TableBench(seconds))
    assert names(found) == ["nano-batch", "nano-batch", "nano-batch, 20 SMs for memory"]
    assert found.best[0].measured[0].seconds == pytest.approx(0.95)


def test_a_plan_measured_once_is_not_chosen() -> None:
    """Also where the winner is slower the second time: that it was not measured again is its luck."""
    again = iter([0.9, 1.0])
    once = {"nano-batch, 20 SMs for memory": 0.92}
    found = search(
        without_profile(),
        [LOAD],
        TableBench(lambda p, _: next(again) if p.name == "nano-batch" else once.get(p.name, 1.0)),
    )
    assert names(found) == ["nano-batch"]
    assert found.best[0].measured[0].seconds == pytest.approx(0.95)


def test_what_was_measured_is_known_again_whatever_the_plan_is_called_and_for(tmp_path: Path) -> None:
    on = MeasuredOn(shape_name(MODEL.config), "NVIDIA H200", SMS, "580", "kernels", 900_000)
    bench, plan = TableBench(lambda *_: 0.5), nano_batch_plan(OPERATIONS, 2048)
    first = open_steps(tmp_path / "steps.json", on, bench).measure(plan, [LOAD])
    known = read_steps(tmp_path / "steps.json", shape_name(MODEL.config))
    stored = replace(plan, name="another", model="m", gpu="g", loads=((682, 1280), (600, 1400)))
    assert known.measure(stored, [LOAD]) == first
    with pytest.raises(NfError, match="not measured in"):
        known.measure(replace(plan, nano_batches=((0, 512), (512, 2048))), [LOAD])


def test_a_gain_that_does_not_come_again_is_none() -> None:
    lucky = iter([0.98])
    found = search(
        without_profile(), [LOAD], TableBench(lambda p, _: next(lucky, 1.02) if p.name == "nano-batch" else 1.0)
    )
    assert found.best == (found.sequential,)
    assert found.results[2].measured[0].seconds == pytest.approx(1.0)  # the mean of both


def test_a_gain_that_cannot_be_measured_again_is_none() -> None:
    def seconds(plan: PipelinePlan, load: Load) -> float:
        if bench.measured.count("nano-batch, 20 SMs for memory") > 1:
            raise DeviceMemoryError("no memory left")
        return by_load(plan, load)

    bench, told = TableBench(seconds), list[str]()
    found = search(without_profile(MIXES), MIXES, bench, progress=told.append)
    assert found.best == (found.sequential,) * 3
    assert told[-1] == "sequential stays: there is no second measurement (no memory left)"


def test_a_stored_plan_is_measured_again_at_every_load() -> None:
    mine = replace(nano_batch_plan(OPERATIONS, 2048), name="mine", model="m", loads=((682, 9),))
    asked = candidates(MODEL, None, MIXES, SMS, more=[mine])
    assert asked[-1].plan == replace(mine, loads=())


def out_of_memory(plan: PipelinePlan, _: Load) -> float:
    if "one stream" in plan.name:
        raise DeviceMemoryError("no memory left")
    return 1.0


def test_a_plan_that_the_hardware_refuses_is_left_out() -> None:
    def seconds(plan: PipelinePlan, _: Load) -> float:
        if "20 SMs" in plan.name:
            raise PlanError("streams", "this GPU cannot give it")
        return 1.0

    found = search(without_profile(), [LOAD], TableBench(seconds))
    assert [bool(result.error) for result in found.results] == [False, False, False, True]
    full = search(without_profile(), [LOAD], TableBench(out_of_memory))
    assert [result.error for result in full.results] == ["", "no memory left", "", ""]
    text = "\n".join(table(record(found, [None], {"model": "m", "gpu": "g"})))
    assert "streams: this GPU cannot give it" in text
    assert "fastest: sequential" in text

    def nothing(_plan: PipelinePlan, _load: Load) -> float:
        raise PlanError("streams", "no")

    with pytest.raises(InputError, match="no"):
        search(without_profile(), [LOAD], TableBench(nothing))


def test_from_a_profile_to_the_choice() -> None:
    """The whole way with formulas in place of the GPU, steps that take what is predicted, give or take a little."""
    profile = formula_profile(bench=FormulaBench(kept=0.99, speed=0.97))
    wanted = candidates(MODEL, profile, [LOAD], SMS, count=4, seconds=3.0)
    assert len(wanted) > 4
    assert len({c.plan.name for c in wanted}) == len(wanted)
    predicted = {c.plan: c.predicted[0] for c in wanted}
    assert all(p is not None for p in predicted.values())

    def seconds(plan: PipelinePlan, _: Load) -> float:
        found = predicted[plan]
        assert found is not None
        return found.seconds * 1.04

    found = search(wanted, [LOAD], TableBench(seconds))
    best = min(p.seconds for p in predicted.values() if p is not None)
    (chosen,) = found.best
    measured = chosen.measured[0].seconds
    assert measured == pytest.approx(best * 1.04) or chosen is found.sequential
    assert measured <= found.sequential.measured[0].seconds
    assert found.median_error == pytest.approx(1 - 1 / 1.04)
    lines = list(table(record(found, [None], {"model": "llama-3-8b", "gpu": "NVIDIA H200"})))
    assert len(lines) == 4 + len(wanted) + 3
    assert "off by 3.8 % (median)" in lines[-1]


def test_the_sequential_step_is_the_sum_of_its_operations() -> None:
    profile = formula_profile()
    shape = batch_shape(LOAD)
    assert (shape.tokens, shape.decode_tokens) == (2048, 682)
    assert shape.decode_context == pytest.approx(1024 + 256, abs=2)
    assert 300 < shape.prefill_context < 800
    cost_of = profiled_costs(profile, shape)
    whole = math.fsum(cost_of(o, shape.rows(o, 0, 2048), "all").seconds for o in OPERATIONS)
    found = of_plan(sequential_plan(OPERATIONS, 2048), MODEL, profile, shape)
    assert found is not None
    assert found.seconds == pytest.approx(32 * whole + profile.cost(ENDS, 682).seconds)


def test_a_plan_is_predicted_alike_by_whoever_made_it() -> None:
    """Turning a candidate's plan back into rounds loses nothing."""
    profile, shape = formula_profile(), batch_shape(LOAD)
    after = profile.cost(ENDS, shape.decode_tokens).seconds
    for proposal in propose(OPERATIONS, shape, profile, seconds=0.5, count=5):
        again = of_plan(proposal.plan, MODEL, profile, shape)
        assert again is not None
        assert again.seconds == pytest.approx(32 * proposal.period + after, rel=1e-6)


def test_what_cannot_be_predicted() -> None:
    profile, shape = formula_profile(), batch_shape(LOAD)
    nano = nano_batch_plan(OPERATIONS, 2048)
    compute, memory = nano.streams
    mixed = replace(compute, nano_operations=(*compute.nano_operations, *memory.nano_operations[:1]))
    odd = replace(nano, streams=(mixed, replace(memory, nano_operations=memory.nano_operations[1:])))
    assert rounds_of(odd, OPERATIONS, shape, profiled_costs(profile, shape)) is None
    assert of_plan(odd, MODEL, profile, shape) is None
    plans = dict(baselines(MODEL, 2048, SMS))
    assert all(of_plan(plan, MODEL, profile, shape) is not None for plan in plans)
    unmeasured = next(plan for plan in baselines(MODEL, 2048, 100) if "20 SMs" in plan[1])[0]
    assert of_plan(unmeasured, MODEL, profile, shape) is None


def test_loads_have_the_share_that_was_asked_for_and_fit_the_memory() -> None:
    for share in (0.1, 0.3, 0.5, 0.7):
        (load,) = loads(2048, 1024, 512, [DecodeShare(share)])
        assert load.num_decode == pytest.approx(2048 * share, abs=2)
        assert sum(new for _, new in load.chunks()) == 2048 - load.num_decode
        (small,) = loads(2048, 1024, 512, [DecodeShare(share)], kv_tokens=300_000)
        assert small.kv_tokens <= 300_000
        assert small.num_decode == pytest.approx(load.num_decode, rel=0.02)
    for bad in (0.0, 1.01, -1.0, math.nan):
        with pytest.raises(InputError, match="above 0 and at most 1"):
            DecodeShare(bad)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.7, 1.0])
@pytest.mark.parametrize("keys", [60, 450, 1800])
def test_loads_have_as_many_keys_as_asked_for(share: float, keys: int) -> None:
    (load,) = loads(2048, 1024, 512, [DecodeShare(share, keys)])
    tokens, seen = made_for(load)
    assert tokens == pytest.approx(2048 * share, rel=0.06)  # of few tokens each is much
    assert seen == pytest.approx(keys, rel=0.04)
    assert load.decode_only == (share == 1)
    (small,) = loads(2048, 1024, 512, [DecodeShare(share, keys)], kv_tokens=50_000)
    assert small.kv_tokens <= max(50_000, 2048 * 4)
    with pytest.raises(InputError, match="keys must be from 1 to"):
        DecodeShare(share, 0)
    with pytest.raises(InputError, match="keys must be from 1 to"):
        DecodeShare(share, MOST_KEYS + 1)


@pytest.mark.parametrize("size", [2, 640, 2048])
def test_with_a_share_of_1_no_prompts_come(size: int) -> None:
    (load,) = loads(size, 1024, 512, [DecodeShare(1)])
    assert (load.num_decode, load.chunks()) == (size, [])
    assert len(load.kv_lens()) == size
    assert 1024 < min(load.kv_lens()) <= max(load.kv_lens()) <= 1024 + 512
    shape = batch_shape(load)
    assert (shape.tokens, shape.decode_tokens, shape.prefill_context) == (size, size, 0)
    assert shape.decode_context == pytest.approx(1024 + 256, abs=256 / size + 1)
    (small,) = loads(size, 1024, 512, [DecodeShare(1)], kv_tokens=300 * size)
    assert 200 * size < small.kv_tokens <= 300 * size
    assert (small.num_decode, small.decode_only) == (size, True)
    mixed, decoding = loads(size, 1024, 512, [DecodeShare(0.5), DecodeShare(1)])
    assert (mixed.decode_only, decoding) == (False, load)


def test_candidates_for_steps_that_only_decode() -> None:
    profile, (load,) = formula_profile(), loads(640, 1024, 512, [DecodeShare(1)])
    found = candidates(MODEL, profile, [load], SMS, count=4, seconds=1.0)
    assert len(found) > 4
    cost_of = profiled_costs(profile, batch_shape(load))
    busy = [cost_of(o, 640, "all").seconds for o in OPERATIONS if o.rows is not Rows.PREFILL]
    (sequential,) = found[0].predicted
    assert sequential is not None
    assert sequential.seconds == pytest.approx(32 * math.fsum(busy) + profile.cost(ENDS, 640).seconds)
    (bound,) = bounds(MODEL, profile, [load])
    assert bound is not None
    for candidate in found:
        validate(candidate.plan, OPERATIONS, gpu_sms=SMS)
        (predicted,) = candidate.predicted
        assert predicted is not None
        assert bound * (1 - 1e-9) <= predicted.seconds < 3 * sequential.seconds
    left = [step_plans([replace(c.plan, loads=((640, 9),))], OPERATIONS)[-1] for c in found]
    assert all(step.decode_only for step in left)
    assert len({(step.plan.nano_batches, step.plan.streams) for step in left}) == len(left)


def test_a_plan_is_measured_as_an_engine_would_run_it() -> None:
    """Itself at every load, and without what only prefill chunks need where none come."""
    mixes = loads(640, 1024, 512, [DecodeShare(share) for share in (0.2, 0.9, 1)])
    for plan, kind in baselines(MODEL, 640, SMS):
        for given in (plan, replace(plan, loads=((600, 9),))):
            for some in (mixes, mixes[:2], mixes[2:]):
                steps = step_plans(plans_for(given, some), OPERATIONS)
                pool = GraphPool([(step, step) for step in steps])  # type: ignore[misc]
                for load in some:
                    step, _ = pool.find(640, load.num_decode, load.batch(16).decode_keys)
                    assert step.decode_only == load.decode_only
                    assert step.plan.nano_batches == plan.nano_batches, kind
                    assert [s.name for s in step.plan.streams] == [s.name for s in plan.streams]


def test_candidates_of_different_batches_do_not_mix() -> None:
    with pytest.raises(InputError, match="one dense batch size"):
        candidates(MODEL, None, [LOAD, Load(1024, 1024, 512)], SMS)


def test_a_search_record_says_nothing_that_was_not_measured() -> None:
    results = tuple(Result(candidate) for candidate in without_profile())
    found = record(Search((LOAD,), results, results[:1]), [None], {"model": "m", "profile": "p"})
    assert [(load["chosen"], load["speed_up"]) for load in found["loads"]] == [(None, None)]
    assert all(load["measured_s"] is None for plan in found["plans"] for load in plan["loads"])
    assert "fastest" not in "\n".join(table(found))
