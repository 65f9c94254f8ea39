"""The last stage of the search: candidates are measured in the real step, and the fastest plan of each load is kept.

Predictions choose what is worth measuring, and so do the first winners, whose neighbours are tried as well;
measurements choose the plans. Two plans that differ by less than runs of one and the same plan do are no different, so
a plan other than the sequential one has to win clearly, and to win again when both are measured once more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as count_from
from statistics import median

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.errors import InputError, NfError
from nf.graphs.builtin import nano_batch_plan, sequential_plan
from nf.graphs.pipeline_plan import PipelinePlan, Stream
from nf.models.declaration import Model
from nf.planning import predict
from nf.planning.kept_steps import StepBench, plain
from nf.planning.loads import batch_shape, made_for
from nf.planning.nano_layer import COMPUTE
from nf.planning.predict import Prediction
from nf.planning.profile import SM_STEP, Profile
from nf.planning.resources import propose

SEQUENTIAL = "sequential"
WORTH = 0.003  # relative; two measurements of one plan differ by up to about as much
HOPEFUL = 1.06  # times the best predicted time of a load; nearly all predictions are off by less
TIED = 4e-4  # relative; of plans whose predicted times differ by no more, one stands for all
_NUMBER = re.compile(r" \(\d+\)$")
PARTITION_SMS = 5 * SM_STEP  # of the partition that is measured where no other one was found worth it


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that is worth measuring.

    Args:
        kind: how its nano-operations share the GPU, for people.
        predicted: per load; None where the profile does not say.
        at: numbers of the loads at which it is measured; None: all.
    """

    plan: PipelinePlan
    kind: str
    predicted: tuple[Prediction | None, ...]
    at: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A candidate and what was measured of it, per load, None where it was not; ``error`` says why it could not be."""

    candidate: Candidate
    measured: tuple[Measurement | None, ...] = ()
    error: str = ""

    @property
    def at(self) -> tuple[int, ...]:
        """Numbers of the loads at which it was measured."""
        return tuple(number for number, found in enumerate(self.measured) if found is not None)

    def ratio(self, base: Result, load: int) -> float:
        """Time over that of ``base`` at a load; infinite where one of them was not measured."""
        own = self.measured[load] if self.measured else None
        other = base.measured[load] if base.measured else None
        return math.inf if own is None or other is None else own.seconds / other.seconds

    def errors(self) -> list[float]:
        """Relative errors of the predicted times, where there are both."""
        pairs = zip(self.candidate.predicted, self.measured, strict=False)
        return [p.seconds / m.seconds - 1 for p, m in pairs if p is not None and m is not None]


@dataclass(frozen=True, slots=True)
class Search:
    """What was measured, the sequential plan first, and which plan is the fastest.

    Args:
        best: per load; the sequential one if nothing was measured.
    """

    loads: tuple[Load, ...]
    results: tuple[Result, ...]
    best: tuple[Result, ...]

    @property
    def sequential(self) -> Result:
        return self.results[0]

    @property
    def median_error(self) -> float:
        """Of the predicted times, over all candidates and loads; NaN if nothing was predicted."""
        errors = [abs(error) for result in self.results for error in result.errors()]
        return median(errors) if errors else math.nan


def baselines(model: Model, dense_batch_size: int, gpu_sms: int) -> list[tuple[PipelinePlan, str]]:
    """The plans of the ablation, as in Fig. 9 of the paper: what nano-batches cost, what overlapping them gains."""
    operations = model.operations
    sequential = sequential_plan(operations, dense_batch_size)
    overlapped = nano_batch_plan(operations, dense_batch_size)
    found = [(sequential, SEQUENTIAL), (one_stream(overlapped, model), "nano-batches, not overlapped")]
    if len(overlapped.streams) < 2:
        return found
    found.append((overlapped, "nano-batches, co-resident"))
    if gpu_sms > 2 * PARTITION_SMS and len(overlapped.streams) == 2:
        found.append((partitioned(overlapped, PARTITION_SMS, gpu_sms), f"nano-batches, {PARTITION_SMS} SMs for memory"))
    return found


def one_stream(plan: PipelinePlan, model: Model) -> PipelinePlan:
    """The nano-batches of ``plan`` with no two nano-operations at the same time."""
    place = {operation.name: index for index, operation in enumerate(model.operations)}
    items = [replace(item, lag=0) for stream in plan.streams for item in stream.nano_operations]
    items.sort(key=lambda item: (place[item.operation], item.nano_batch))
    return replace(plan, name=f"{plan.name}, one stream", streams=(Stream(COMPUTE, tuple(items)),))


def partitioned(plan: PipelinePlan, memory_sms: int, gpu_sms: int) -> PipelinePlan:
    """``plan`` with SMs of their own for both of its streams."""
    sms = {COMPUTE: gpu_sms - memory_sms}
    streams = tuple(replace(stream, sms=sms.get(stream.name, memory_sms)) for stream in plan.streams)
    return replace(plan, name=f"{plan.name}, {memory_sms} SMs for memory", streams=streams)


def candidates(
    model: Model,
    profile: Profile | None,
    loads: Sequence[Load],
    gpu_sms: int,
    *,
    count: int = 6,
    seconds: float = 100.0,
    more: Sequence[PipelinePlan] = (),
) -> list[Candidate]:
    """What is worth measuring: the baselines everywhere; at each load at most ``count`` plans of Stages I and II, those
    that are predicted to be the fastest, if close to the best; and ``more``.

    Args:
        profile: None leaves Stages I and II out, and predictions.
        loads: of one dense batch size.
        seconds: to search for, over all loads.
        more: the user's own plans, each for those of the loads that it names, for all if it names none of them.

    Raises:
        InputError: an operation was not measured.
    """
    size = loads[0].dense_batch_size
    if any(load.dense_batch_size != size for load in loads):
        raise InputError("loads", "must all have one dense batch size")
    kinds = dict(baselines(model, size, gpu_sms))
    asked: dict[PipelinePlan, tuple[int, ...] | None] = dict.fromkeys(kinds)
    if profile is not None and count:
        for load in loads:
            for proposal in propose(
                model.operations, batch_shape(load), profile, seconds=seconds / len(loads), count=count + 1
            ):
                kinds.setdefault(proposal.plan, proposal.arrangement)
    for plan in more:
        given = replace(plan, loads=())
        kinds.setdefault(given, "given")
        own = tuple(number for number, load in enumerate(loads) if made_for(load) in plan.loads)
        before = asked.get(given, ())  # of another file with the same pipeline, or a baseline: everywhere
        asked[given] = tuple(dict.fromkeys([*before, *own])) if own and before is not None else None
    found = [candidate_of(plan, kind, model, profile, loads) for plan, kind in kinds.items()]
    return _worth_measuring(found, asked, count)


def _worth_measuring(
    found: Sequence[Candidate], asked: Mapping[PipelinePlan, tuple[int, ...] | None], count: int
) -> list[Candidate]:
    """Each with the loads at which it is: those ``asked`` for, else those where there is hope; no two names alike."""
    per_load = zip(*(candidate.predicted for candidate in found), strict=True)
    best = [min((p.seconds for p in predicted if p is not None), default=math.inf) for predicted in per_load]
    hope = _hopeful([candidate for candidate in found if candidate.plan not in asked], best, count)
    worth = [replace(c, at=asked[c.plan] if c.plan in asked else hope.get(c.plan, ())) for c in found]
    worth = [candidate for candidate in worth if candidate.at != ()]
    plans = _named_apart([candidate.plan for candidate in worth])
    return [replace(candidate, plan=plan) for candidate, plan in zip(worth, plans, strict=True)]


def _hopeful(proposed: Sequence[Candidate], best: Sequence[float], count: int) -> dict[PipelinePlan, tuple[int, ...]]:
    """Loads at which a plan is one of the ``count`` fastest by prediction, and takes little longer than the fastest of
    all does, ``best`` seconds."""
    at: dict[PipelinePlan, tuple[int, ...]] = {}
    for number, least in enumerate(best):
        times = {c.plan: p.seconds for c in proposed if (p := c.predicted[number]) is not None}
        taken: list[float] = []
        for plan in sorted(times, key=lambda plan: times[plan]):
            if len(taken) == count or times[plan] > HOPEFUL * least:
                break
            if not taken or times[plan] > taken[-1] * (1 + TIED):
                taken.append(times[plan])
                at[plan] = (*at.get(plan, ()), number)
    return at


def candidate_of(
    plan: PipelinePlan, kind: str, model: Model, profile: Profile | None, loads: Sequence[Load]
) -> Candidate:
    """The plan with what the profile predicts of it, if there is one."""
    if profile is None:
        return Candidate(plan, kind, (None,) * len(loads))
    return Candidate(plan, kind, tuple(predict.of_plan(plan, model, profile, batch_shape(load)) for load in loads))


def _named_apart(plans: Sequence[PipelinePlan]) -> list[PipelinePlan]:
    """The plans, with a number behind a name that one before has; names may have come with one."""
    found: dict[str, PipelinePlan] = {}
    for plan in plans:
        name, plain_name = plan.name, _NUMBER.sub("", plan.name)
        others = (f"{plain_name} ({number})" for number in count_from(2))
        while name in found:
            name = next(others)
        found[name] = replace(plan, name=name)
    return list(found.values())


def search(
    wanted: Sequence[Candidate],
    loads: Sequence[Load],
    bench: StepBench,
    *,
    vary: Callable[[PipelinePlan], Iterable[Candidate]] = lambda _: (),
    progress: Callable[[str], object] = lambda _: None,
) -> Search:
    """Measure all candidates, then what is close to those that win, and choose one for each load.

    A plan that the hardware refuses, or has not enough memory for, is noted and left out; if those that win cannot be
    measured once more, the sequential plan stays.

    Args:
        wanted: the sequential plan first.
        vary: candidates close to a plan.
        progress: called with a few words before and after a candidate is measured.
    """
    results: list[Result] = []
    for candidate in wanted:
        results.append(_once(candidate, loads, bench, progress, required=not results))
    for candidate in _close_to_winners(results, len(loads), vary):
        _add(results, _once(candidate, loads, bench, progress))
    base, winners = results[0], _winners(results, len(loads))
    best = [base] * len(loads)
    if winners:
        try:
            again = [_once_more(result, loads, bench, progress) for result in (base, *winners)]
        except NfError as error:
            progress(f"sequential stays: there is no second measurement ({error})")
        else:
            for before, after in zip((base, *winners), again, strict=True):
                results[results.index(before)] = after
            best = fastest(again, len(loads))
    return Search(tuple(loads), tuple(results), tuple(best))


def _close_to_winners(
    results: Sequence[Result], num_loads: int, vary: Callable[[PipelinePlan], Iterable[Candidate]]
) -> list[Candidate]:
    """What is close to the winner of a load, each once and for all loads where that is so and it was not measured."""
    known = {plain(result.candidate.plan): result for result in results}
    near: dict[PipelinePlan, Candidate] = {}
    at: dict[PipelinePlan, list[int]] = {}
    for number, winner in enumerate(fastest(results, num_loads)):
        for candidate in vary(winner.candidate.plan) if winner is not results[0] else ():
            own = plain(candidate.plan)
            before = known.get(own)
            if before is None or not (before.error or number in before.at):
                near.setdefault(own, candidate if before is None else before.candidate)
                at.setdefault(own, []).append(number)
    new = [own for own in near if own not in known]
    names = _named_apart([*(result.candidate.plan for result in results), *(near[own].plan for own in new)])
    named = dict(zip(new, names[len(results) :], strict=True))
    return [
        replace(candidate, plan=named.get(own, candidate.plan), at=tuple(dict.fromkeys(at[own])))
        for own, candidate in near.items()
    ]


def _add(results: list[Result], more: Result) -> None:
    """Take a result in; one of a plan that was measured at other loads before joins the earlier one."""
    for number, result in enumerate(results):
        if plain(result.candidate.plan) == plain(more.candidate.plan):
            if not more.error:
                joined = (a or b for a, b in zip(result.measured, more.measured, strict=True))
                results[number] = replace(result, measured=tuple(joined))
            return
    results.append(more)


def _once(
    candidate: Candidate,
    loads: Sequence[Load],
    bench: StepBench,
    progress: Callable[[str], object],
    required: bool = False,
) -> Result:
    """A first result; ``required`` of the sequential plan, without which there is nothing to compare with."""
    progress(f"measuring {candidate.plan.name}")
    at = range(len(loads)) if candidate.at is None else candidate.at
    try:
        result = Result(candidate, _measured(candidate.plan, at, loads, bench))
    except NfError as error:
        if required:
            raise
        result = Result(candidate, error=str(error))
    progress("  " + (result.error or ", ".join(f"{1e3 * m.seconds:.2f} ms" if m else "–" for m in result.measured)))
    return result


def _measured(
    plan: PipelinePlan, at: Sequence[int], loads: Sequence[Load], bench: StepBench
) -> tuple[Measurement | None, ...]:
    found = dict(zip(at, bench.measure(plan, [loads[number] for number in at]), strict=True))
    return tuple(found.get(number) for number in range(len(loads)))


def _once_more(result: Result, loads: Sequence[Load], bench: StepBench, progress: Callable[[str], object]) -> Result:
    """The result with the means of its measurements and of new ones."""
    progress(f"measuring {result.candidate.plan.name} once more")
    second = _measured(result.candidate.plan, result.at, loads, bench)
    pairs = zip(result.measured, second, strict=True)
    means = tuple(None if a is None or b is None else _mean(a, b) for a, b in pairs)
    return replace(result, measured=means)


def _winners(results: Sequence[Result], num_loads: int) -> list[Result]:
    """Each of the fastest once, but for the sequential plan."""
    return [result for result in dict.fromkeys(fastest(results, num_loads)) if result is not results[0]]


def fastest(results: Sequence[Result], num_loads: int) -> list[Result]:
    """Per load the fastest plan, which is the first of ``results`` unless another is clearly faster."""
    base = results[0]
    found = []
    for load in range(num_loads):
        best = min(results, key=lambda result: result.ratio(base, load))
        found.append(best if best.ratio(base, load) < 1 - WORTH else base)
    return found


def _mean(a: Measurement, b: Measurement) -> Measurement:
    return Measurement((a.seconds + b.seconds) / 2, (a.joules + b.joules) / 2)


def bounds(model: Model, profile: Profile | None, loads: Sequence[Load]) -> tuple[float | None, ...]:
    """Per load, the seconds of a step that no plan can beat by what ``profile`` predicts; None without one."""
    return tuple(None if profile is None else predict.bound(model, profile, batch_shape(load)) for load in loads)
