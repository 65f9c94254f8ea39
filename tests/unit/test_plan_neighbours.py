"""Plans a step away from a winner: what they are, and that the search measures them as well."""

from __future__ import annotations

from dataclasses import replace

from fake_profile import SMS
from test_search import LOAD, OPERATIONS, TableBench, without_profile

from nf.bench.steady_step import Load
from nf.graphs.pipeline_plan import Stream
from nf.graphs.plan import PipelinePlan, nano_batch_plan, sequential_plan, validate
from nf.planning.neighbours import neighbours
from nf.planning.search import (
    Candidate,
    partitioned,
    search,
)


def cut_plan(memory_sms: int, cut: int) -> PipelinePlan:
    """Two nano-batches on partitions of the GPU."""
    plan = partitioned(nano_batch_plan(OPERATIONS, 2048), memory_sms, SMS)
    return replace(plan, nano_batches=((0, cut), (cut, 2048)))


def test_neighbours_are_a_step_away_and_valid() -> None:
    near = list(neighbours(cut_plan(24, 512)))
    sizes = {(plan.streams[1].sms, plan.nano_batches[0][1]) for plan in near}
    assert sizes == {(20, 512), (28, 512), (24, 256), (24, 768)}
    for plan in near:
        validate(plan, OPERATIONS, gpu_sms=SMS)
        assert sum(int(stream.sms) for stream in plan.streams) == SMS
    assert len({plan.name for plan in near}) == 4
    at_the_end = {(plan.streams[1].sms, plan.nano_batches[0][1]) for plan in neighbours(cut_plan(4, 1900))}
    assert at_the_end == {(8, 1900), (4, 1644)}
    compute, memory = cut_plan(24, 512).streams
    others = (replace(compute, nano_operations=compute.nano_operations[:-1]), memory)
    third = Stream("third", compute.nano_operations[-1:], sms=8)
    half = replace(cut_plan(24, 512), streams=(compute, replace(memory, sms="all")))
    three = replace(cut_plan(24, 512), streams=(*others, third))
    whole = replace(cut_plan(24, 512), nano_batches=((0, 2048),))
    for plan in (sequential_plan(OPERATIONS, 2048), nano_batch_plan(OPERATIONS, 2048), half, three, whole):
        assert list(neighbours(plan)) == []


def test_what_is_close_to_a_winner_is_measured_as_well() -> None:
    start, best = cut_plan(20, 1024), cut_plan(16, 1024)

    def seconds(plan: PipelinePlan, _: Load) -> float:
        nameless = replace(plan, name=start.name)
        return 0.9 if nameless == start else 0.8 if nameless == replace(best, name=start.name) else 1.0

    def vary(plan: PipelinePlan) -> list[Candidate]:
        return [Candidate(near, "neighbour", (None,)) for near in neighbours(plan)]

    bench = TableBench(seconds)
    found = search(without_profile(), [LOAD], bench, vary=vary)
    assert replace(found.best[0].candidate.plan, name=best.name) == best
    assert found.best[0].candidate.kind == "neighbour"
    assert len(bench.measured) == 4 + 4 + 2  # the baselines, the winner's neighbours, the last two once more
    assert len({result.candidate.plan.name for result in found.results}) == len(found.results)
    none = TableBench(lambda *_: 1.0)
    search(without_profile(), [LOAD], none, vary=vary)
    assert len(none.measured) == 4


def test_a_neighbour_that_was_measured_already_is_not_measured_again() -> None:
    wanted = [*without_profile(), Candidate(cut_plan(16, 1024), "given", (None,))]
    known = len(wanted)

    def vary(plan: PipelinePlan) -> list[Candidate]:
        near = [*neighbours(plan), *neighbours(plan)]
        return [Candidate(each, "neighbour", (None,)) for each in near]

    def seconds(plan: PipelinePlan, _: Load) -> float:
        return 0.9 if plan.nano_batches[0][1] == 1024 and plan.streams[-1].sms == 20 else 1.0

    found = search(wanted, [LOAD], TableBench(seconds), vary=vary)
    assert len(found.results) == known + 3  # two other cuts and 24 SMs; 16 SMs were given
