"""At which loads the search measures a plan, and what it makes of plans that were not measured at all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fake_profile import MODEL, SMS, FormulaBench, formula_profile

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.cli.plan_search import write_plans
from nf.cli.plan_search_table import table
from nf.errors import NfError
from nf.graphs.plan import PipelinePlan, load_plan, nano_batch_plan
from nf.planning import search as search_module
from nf.planning.coverage import covering_plans
from nf.planning.kept_steps import MeasuredOn, open_steps, read_steps
from nf.planning.loads import batch_shape, made_for
from nf.planning.nano_layer import BatchShape
from nf.planning.neighbours import neighbours
from nf.planning.predict import Prediction
from nf.planning.resources import Proposal
from nf.planning.search import HOPEFUL, TIED, Candidate, Search, candidates, partitioned, search
from nf.planning.search_record import record

LOADS = [Load(2048, 1400, 100), Load(2048, 700, 700), Load(2048, 300, 1000)]
EVERYWHERE = (0, 1, 2)
COUNT = 2  # plans of Stages I and II per load


class Bench:
    """Steps that take what a function says; keeps which plan was measured at which loads, in order."""

    def __init__(self, seconds: Callable[[PipelinePlan, int], float]) -> None:
        self.seconds, self.asked = seconds, list[tuple[str, tuple[int, ...]]]()

    def measure(self, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        numbers = [LOADS.index(load) for load in loads]
        self.asked.append((plan.name, tuple(numbers)))
        return [Measurement(s := self.seconds(plan, number), 690 * s) for number in numbers]


def cut_plan(memory_sms: int, cut: int, name: str = "cut") -> PipelinePlan:
    plan = partitioned(nano_batch_plan(MODEL.operations, 2048), memory_sms, SMS)
    return replace(plan, name=name, nano_batches=((0, cut), (cut, 2048)))


def proposed() -> list[Candidate]:
    profile = formula_profile(bench=FormulaBench(kept=0.99, speed=0.97))
    return candidates(MODEL, profile, LOADS, SMS, count=COUNT, seconds=3.0)


def test_a_plan_is_measured_where_it_is_predicted_to_come_close_to_the_best() -> None:
    wanted = proposed()
    best = [min(p.seconds for c in wanted if (p := c.predicted[number])) for number in EVERYWHERE]
    baselines, others = wanted[:4], wanted[4:]
    assert [candidate.at for candidate in baselines] == [None] * 4
    assert all(candidate.at for candidate in others)
    for number in EVERYWHERE:
        times = {c.plan.name: p.seconds for c in others if (p := c.predicted[number])}
        chosen = sorted(times[c.plan.name] for c in others if number in (c.at or ()))
        assert 0 < len(chosen) <= COUNT
        assert chosen[0] == min(times.values())
        assert chosen[-1] <= HOPEFUL * best[number]
        assert all(after > before * (1 + TIED) for before, after in pairwise(chosen))
        for seconds in times.values():  # what was passed over is slower, or like one that was not
            slower = seconds > HOPEFUL * best[number] or (len(chosen) == COUNT and seconds >= chosen[-1])
            assert slower or any(one <= seconds <= one * (1 + TIED) for one in chosen)
    assert any(candidate.at != EVERYWHERE for candidate in others)
    bench = Bench(lambda *_: 1.0)
    search(wanted, LOADS, bench)
    assert bench.asked == [(c.plan.name, EVERYWHERE if c.at is None else c.at) for c in wanted]


def test_at_most_so_many_plans_are_measured_at_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest by prediction; of those that are tied the first; none that is far behind the best of all."""
    tied, apart = 1 + 0.7 * TIED, 1 + 1.5 * TIED
    times = {
        "a": (0.80, 0.90, 0.90),
        "b": (0.80 * tied, 0.91, 0.90 * HOPEFUL * 1.001),
        "c": (0.80 * apart, 0.92, 2.0),
        "d": (0.80 * apart * tied, 0.93, 2.0),  # tied with c, not with a
        "e": (0.84, 0.94, 2.0),
        "f": (0.845, 0.95, 2.0),  # the fourth
    }
    baseline = (1.0, 0.80, 1.0)  # better at the second load than all of them
    plans = [cut_plan(24, 256 * (i + 1), name) for i, name in enumerate(times)]
    monkeypatch.setattr(search_module, "propose", lambda *_, **__: [Proposal(p, "24 SMs", 1.0, 1.0) for p in plans])

    def of_plan(plan: PipelinePlan, _model: object, _profile: object, shape: BatchShape) -> Prediction:
        number = next(n for n, load in enumerate(LOADS) if batch_shape(load) == shape)
        return Prediction(times.get(plan.name, baseline)[number], 1.0)

    monkeypatch.setattr(search_module.predict, "of_plan", of_plan)
    found = candidates(MODEL, formula_profile(), LOADS, SMS, count=3)[4:]
    assert {c.plan.name: c.at for c in found} == {"a": (0, 2), "c": (0,), "e": (0,)}


def test_what_is_written_for_later_is_measured_at_the_same_loads(tmp_path: Path) -> None:
    wanted = proposed()
    write_plans(tmp_path, wanted, LOADS)
    files = sorted(tmp_path.iterdir())
    again = candidates(MODEL, None, LOADS, SMS, more=[load_plan(str(file), MODEL.operations) for file in files])
    assert [(c.plan, c.at) for c in again] == [(c.plan, c.at) for c in wanted]


def test_a_given_plan_is_measured_at_the_loads_that_it_names_or_at_all() -> None:
    here, nowhere = replace(cut_plan(24, 512, "here"), loads=(made_for(LOADS[1]),)), cut_plan(24, 768, "nowhere")
    elsewhere = replace(cut_plan(16, 768, "elsewhere"), loads=((1, 1),))
    *_, first, second, third = candidates(MODEL, None, LOADS, SMS, more=[here, nowhere, elsewhere])
    assert [first.at, second.at, third.at] == [(1,), None, None]
    assert {candidate.plan.loads for candidate in (first, second, third)} == {()}


def test_no_two_names_are_alike_wherever_they_come_from() -> None:
    """A file may hold a plan that was the second of its name elsewhere."""
    names = ["cut", "cut", "cut (2)", "cut", "cut (2)"]
    plans = [cut_plan(24, 256 * (i + 1), name) for i, name in enumerate(names)]
    wanted = candidates(MODEL, None, LOADS, SMS, more=plans)[4:]
    assert [c.plan.name for c in wanted] == ["cut", "cut (2)", "cut (3)", "cut (4)", "cut (5)"]
    assert [c.plan.nano_batches for c in wanted] == [plan.nano_batches for plan in plans]


def without_one_load() -> Search:
    """A plan that wins at two loads, is not measured at the third, and would lose there."""
    plan = replace(cut_plan(24, 512), loads=(made_for(LOADS[1]), made_for(LOADS[2])))
    wanted = candidates(MODEL, None, LOADS, SMS, more=[plan])
    return search(wanted, LOADS, Bench(lambda plan, number: 0.9 if plan.name == "cut" and number else 1.0))


def test_a_plan_wins_only_where_it_was_measured() -> None:
    found = without_one_load()
    assert [best.candidate.plan.name for best in found.best] == ["sequential", "cut", "cut"]
    result = record(found, [None] * 3, {"model": "m", "gpu": "g"})
    json.dumps(result, allow_nan=False)
    (own,) = (plan for plan in result["plans"] if plan["name"] == "cut")
    assert [load["measured_s"] for load in own["loads"]] == [None, pytest.approx(0.9), pytest.approx(0.9)]
    assert [load["speed_up"] for load in own["loads"]] == [None, pytest.approx(1 / 0.9), pytest.approx(1 / 0.9)]
    lines = [line for line in table(result) if line.startswith("  cut ")]
    assert ["–  " in line and "900.00 ms" not in line for line in lines] == [True, False, False]


def test_what_was_measured_at_some_loads_sets_predictions_right_there_alone() -> None:
    profile = formula_profile()
    plan = replace(cut_plan(24, 512), loads=(made_for(LOADS[1]),))
    wanted = candidates(MODEL, profile, LOADS, SMS, count=0, more=[plan])
    times = {(c.plan.name, n): p.seconds for c in wanted for n, p in enumerate(c.predicted) if p}
    found = search(wanted, LOADS, Bench(lambda plan, n: 1e-3 if plan.name == "cut" else times[plan.name, n]))
    (own,) = (plan for plan in covering_plans(found, MODEL, profile, 900_000) if plan.name == "cut")
    assert made_for(LOADS[1]) in own.loads
    assert len(own.loads) > 1


def test_neighbours_are_measured_where_their_winner_won() -> None:
    """16 and 24 SMs win a load each; 20, close to both, is measured at both, what is close to one at one."""
    wins = {1: (16, 512), 2: (24, 512)}
    wanted = candidates(MODEL, None, LOADS, SMS, more=[cut_plan(16, 512, "16"), cut_plan(24, 512, "24")])

    def seconds(plan: PipelinePlan, number: int) -> float:
        return 0.9 if (plan.streams[-1].sms, plan.nano_batches[0][1]) == wins.get(number) else 1.0

    bench = Bench(seconds)
    found = search(
        wanted, LOADS, bench, vary=lambda plan: [Candidate(n, "neighbour", (None,) * 3) for n in neighbours(plan)]
    )
    assert [best.candidate.plan.name for best in found.best] == ["sequential", "16", "24"]
    near = dict(bench.asked[len(wanted) : -3])
    assert near == {
        "12 SMs for memory, cut at 512": (1,),
        "20 SMs for memory, cut at 512": (1, 2),
        "16 SMs for memory, cut at 256": (1,),
        "16 SMs for memory, cut at 768": (1,),
        "28 SMs for memory, cut at 512": (2,),
        "24 SMs for memory, cut at 256": (2,),
        "24 SMs for memory, cut at 768": (2,),
    }
    assert bench.asked[-3:] == [("sequential", EVERYWHERE), ("16", EVERYWHERE), ("24", EVERYWHERE)]


def test_a_neighbour_that_was_measured_at_another_load_is_measured_where_its_winner_won() -> None:
    other = replace(cut_plan(20, 512, "20"), loads=(made_for(LOADS[2]),))
    wanted = candidates(MODEL, None, LOADS, SMS, more=[cut_plan(16, 512, "16"), other])

    def seconds(plan: PipelinePlan, number: int) -> float:
        memory, cut = plan.streams[-1].sms, plan.nano_batches[0][1]
        return {(16, 512): 0.9, (20, 512): 0.8}.get((memory, cut), 1.0) if number == 1 else 1.0

    bench = Bench(seconds)
    found = search(
        wanted, LOADS, bench, vary=lambda plan: [Candidate(n, "neighbour", (None,) * 3) for n in neighbours(plan)]
    )
    assert [best.candidate.plan.name for best in found.best] == ["sequential", "20", "sequential"]
    assert [asked for asked in bench.asked if asked[0] == "20"] == [("20", (2,)), ("20", (1,)), ("20", (1, 2))]
    (own,) = (result for result in found.results if result.candidate.plan.name == "20")
    assert own.at == (1, 2)


def test_one_plan_at_one_load_after_the_other_is_kept_and_found(tmp_path: Path) -> None:
    on = MeasuredOn("m", "a GPU", SMS, "1", "x", 1000)
    bench = Bench(lambda _, number: 1.0 + number)
    kept, plan = open_steps(tmp_path / "steps.json", on, bench), cut_plan(16, 512)
    assert [m.seconds for m in kept.measure(plan, LOADS[:1])] == [1.0]
    assert [m.seconds for m in kept.measure(replace(plan, name="other"), LOADS[1:])] == [2.0, 3.0]
    assert kept.at(plan, LOADS) == EVERYWHERE
    again = read_steps(tmp_path / "steps.json", "m")
    assert again.at(plan, LOADS[::-1]) == EVERYWHERE
    assert again.at(cut_plan(16, 768), LOADS) == ()
    assert [m.seconds for m in again.measure(plan, LOADS[1:2])] == [2.0]
    with pytest.raises(NfError, match=r"cut at 700 in, 700 out was only once measured in .*steps\.json"):
        again.measure(plan, LOADS[1:2])
