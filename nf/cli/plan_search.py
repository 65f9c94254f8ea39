"""``nf plan search``: find the fastest pipeline plans for a model on this machine's GPU, and keep them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf.cli.files import check_picture, check_writable
from nf.cli.options import named_by_flag
from nf.cli.plan_profile import measured_profile, the_gpu
from nf.files import make_folder

if TYPE_CHECKING:
    from nf.bench.steady_step import Load
    from nf.graphs.pipeline_plan import PipelinePlan
    from nf.kernels.device import Device
    from nf.models.declaration import Model
    from nf.planning.kept_steps import KeptSteps, MeasuredOn, StepBench
    from nf.planning.loads import DecodeShare
    from nf.planning.profile import Profile
    from nf.planning.search import Candidate, Search

DESCRIPTION = """\
Profile a model's nano-operations, look for the pipelines that should be the fastest (Stages I and
II of NanoFlow, with power as a further resource), measure these and the sequential plan as whole
steps at steady state, and keep the fastest for each load. From then on engines take it for steps
like that load; between the loads the profile says which of the plans that won is taken. "Do not
overlap" is among the candidates, and wins where nothing is clearly faster.
"""

EXAMPLES = """\
examples:
  nf plan search llama-3-8b --quick
  nf plan search ./llama --dense-batch-size 4096 --decode-share 0.1,0.3,0.5,0.7,0.5@450
  nf plan search llama-3-8b --dense-batch-size 640 --decode-share 1      steps that only decode
  nf plan search llama-3-8b --add mine.json --count 0       measure a plan of your own
  nf plan search llama-3-8b --profile h200.json --predict-only      no GPU needed
  nf plan search llama-3-8b --add mine.json --count 0 --no-store --results steps.json
  nf plan search llama-3-8b --profile h200.json --measured steps.json      no GPU needed
  nf plan search llama-3-8b --profile docs/examples/a100-nanoflow.json --predict-only \\
      --dense-batch-size 1024 --input-len 788 --output-len 473
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory, a hub name, or a shape such as llama-3-8b")
    add("--dense-batch-size", type=int, default=2048, metavar="N", help="tokens per step (default 2048)")
    add("--input-len", type=int, default=1024, metavar="N", help="tokens of a prompt (default 1024)")
    add("--output-len", type=int, default=512, metavar="N", help="tokens generated (default 512)")
    add("--kv-tokens", type=int, metavar="N", help="of the KV cache: longer requests are cut (default: as the GPU has)")
    add(
        "--decode-share",
        type=_shares,
        default=(),
        metavar="X,…",
        help="decode tokens of a step, one load and one plan kept per share, 0.5@450 with 450 keys for each of them on "
        "average; with 1 no prompts come",
    )
    add(
        "--count",
        type=int,
        default=6,
        metavar="K",
        help="plans of Stages I and II to measure, at most, per load (default 6)",
    )
    add("--seconds", type=float, default=100.0, metavar="S", help="for Stages I and II (default 100)")
    add(
        "--add",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="measure these plans too, at those of the loads that they name or else at all (after MODEL)",
    )
    add("--quick", action="store_true", help="profile in at most 3 minutes, and measure each step for 0.7 s, not 2 s")
    add("--profile", metavar="FILE", help="take this profile and measure no nano-operation")
    add("--predict-only", action="store_true", help="measure no step; with --profile no GPU is needed")
    add("--results", metavar="FILE", help="keep measured steps there as they come; measure none that it has")
    add(
        "--measured",
        metavar="FILE",
        help="take the steps that --results kept and measure none; no GPU needed; --count, --seconds and --quick do "
        "nothing then",
    )
    add("--plans-dir", metavar="DIR", help="write the candidates there, as plan files")
    add("--store", metavar="DIR", help="keep the fastest plan of each load there (default: where engines look for it)")
    add("--no-store", action="store_true", help="keep nothing")
    add("--plot", metavar="FILE", help="draw a step's use of the GPU, sequential and chosen plan (SVG)")
    add("--json", action="store_true", help="as one JSON object")
    add("-q", "--quiet", action="store_true", help="say nothing on the way")


@dataclass(frozen=True, slots=True)
class _Where:
    """Where steps are measured, or were.

    Args:
        device: None where nothing is measured now.
        on: what measured steps are valid for; None without a GPU and without such steps.
        bench: None where steps are predicted only.
        kept: steps that were measured before, the only ones there are.
    """

    device: Device | None = None
    on: MeasuredOn | None = None
    bench: StepBench | None = None
    kept: KeptSteps | None = None


def run(args: argparse.Namespace) -> int:
    from nf.cli.estimate import model_config
    from nf.models.registry import declare
    from nf.planning.loads import loads as all_loads

    _check(args)
    if args.plans_dir is not None:
        make_folder("--plans-dir", args.plans_dir)
    model = declare(model_config(args.model))
    where = _where(args, model)
    room = args.kv_tokens
    if room is None and where.on is not None:
        room = where.on.kv_tokens
    with named_by_flag():
        loads = all_loads(args.dense_batch_size, args.input_len, args.output_len, args.decode_share, room)
    profile, wanted = _candidates(args, model, loads, where)
    if args.plans_dir is not None:
        write_plans(Path(args.plans_dir), wanted, loads)
    if args.predict_only:
        result = _predicted(args, model, profile, wanted, loads)
    else:
        result = _measured(args, model, where, profile, wanted, loads)
    _print(args, result)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before any work is.

    Raises:
        InputError: it names the option.
    """
    from nf.errors import InputError
    from nf.planning.integer_program import solver

    check_picture(args.plot)
    bounded = ("--count", args.count, 0), ("--kv-tokens", args.kv_tokens, 1), ("--seconds", args.seconds, 0)
    for flag, value, least in bounded:
        if value is not None and not value >= least:
            raise InputError(flag, f"must be at least {least}, got {value}")
    if args.predict_only and args.measured is not None:
        raise InputError("--predict-only", "cannot be used with --measured")
    for flag, given in (("--predict-only", args.predict_only), ("--measured", args.measured is not None)):
        if given and args.plot is not None:
            raise InputError("--plot", f"needs a step that runs; leave out {flag}")
        if given and args.results is not None:
            raise InputError(flag, "cannot be used with --results")
    check_writable("--results", args.results)
    if _count(args):
        solver()


def _count(args: argparse.Namespace) -> int:
    """Plans of Stages I and II that are looked for: none where steps were measured before, as only theirs count."""
    return 0 if args.measured is not None else int(args.count)


def _where(args: argparse.Namespace, model: Model) -> _Where:
    from nf.graphs.plan_store import shape_name
    from nf.planning.gpu_step_bench import GpuStepBench
    from nf.planning.kept_steps import open_steps, read_steps

    if args.measured is not None:
        kept = read_steps(Path(args.measured), shape_name(model.config))
        return _Where(on=kept.on, bench=kept, kept=kept)
    if args.predict_only and args.profile is not None:
        return _Where()
    device = the_gpu(model)
    on = _measured_on(model, device)
    if args.predict_only:
        return _Where(device, on)
    bench = GpuStepBench(model, device, quick=args.quick)
    return _Where(device, on, bench if args.results is None else open_steps(Path(args.results), on, bench))


def _measured_on(model: Model, device: Device) -> MeasuredOn:
    from nf.executors.gpu_weights import layout
    from nf.graphs.plan_store import shape_name
    from nf.planning.gpu_bench import profile_key
    from nf.planning.gpu_step_bench import SPARE_BYTES
    from nf.planning.kept_steps import MeasuredOn
    from nf.planning.operation_costs import kv_bytes_per_token

    key = profile_key(device)
    free = 0.92 * device.memory()[1] - layout(model).num_bytes - 2 * SPARE_BYTES
    room = int(max(1.0, free / kv_bytes_per_token(model.config)))
    return MeasuredOn(shape_name(model.config), device.name, device.sms, key.driver, key.kernels, room)


def _candidates(
    args: argparse.Namespace, model: Model, loads: list[Load], where: _Where
) -> tuple[Profile | None, list[Candidate]]:
    """What is worth measuring and the profile that says so; the user's files are read before the GPU is used."""
    from nf.graphs.plan import load_plan
    from nf.graphs.plan_store import shape_name
    from nf.planning.profile_file import read_profile
    from nf.planning.search import candidates

    size, count = args.dense_batch_size, _count(args)
    profile = None
    if args.profile is not None:
        profile = read_profile(Path(args.profile), shape_name(model.config))
        largest = max((rows for _, rows, *_ in profile.solos), default=0)
        if largest < size:
            _say(args, f"the profile ends at {largest:,} rows; what is beyond is extrapolated")
    if where.on is not None:
        gpu_sms = where.on.gpu_sms
    else:
        assert profile is not None  # without a GPU there is one, or what was measured
        gpu_sms = profile.gpu_sms
    given = [load_plan(file, model.operations, size, gpu_sms=gpu_sms) for file in args.add]
    if where.kept is not None:
        kept = [plan for plan in where.kept.plans if plan.dense_batch_size == size]
        wanted = candidates(model, profile, loads, gpu_sms, count=0, more=[*given, *kept])
        return profile, _those_measured(args, where.kept, wanted, given, loads)
    if profile is None and where.device is not None and count:
        _say(args, "profiling nano-operations")
        profile = measured_profile(model, where.device, size, quick=args.quick, quiet=args.quiet)[0]
    if profile is not None and count:
        _say(args, "Stages I and II")
    return profile, candidates(model, profile, loads, gpu_sms, count=count, seconds=args.seconds, more=given)


def _those_measured(
    args: argparse.Namespace, kept: KeptSteps, wanted: list[Candidate], given: list[PipelinePlan], loads: list[Load]
) -> list[Candidate]:
    """Each at the loads that it was measured at, the sequential plan at all of them.

    Raises:
        InputError: a given plan was measured at none.
    """
    from nf.errors import InputError

    for file, plan in zip(args.add, given, strict=True):
        if not kept.at(plan, loads):
            raise InputError("--add", f"{file} was not measured in {args.measured} at any of these loads")
    sequential, *others = [replace(each, at=kept.at(each.plan, loads)) for each in wanted]
    return [replace(sequential, at=None), *(each for each in others if each.at)]


def write_plans(folder: Path, wanted: list[Candidate], loads: list[Load]) -> None:
    """Each with the loads at which it is worth measuring; with none if that is at all of them."""
    from nf.planning.loads import made_for

    for number, candidate in enumerate(wanted):
        at = tuple(made_for(loads[load]) for load in candidate.at or ())
        (folder / f"{number:02}.json").write_text(replace(candidate.plan, loads=at).to_json(), encoding="utf-8")


def _measured(
    args: argparse.Namespace,
    model: Model,
    where: _Where,
    profile: Profile | None,
    wanted: list[Candidate],
    loads: list[Load],
) -> dict[str, Any]:
    """A search's record, the fastest plan of each load stored, and one drawn."""
    from nf.graphs.plan_store import save_plans
    from nf.planning.coverage import covering_plans
    from nf.planning.neighbours import neighbours
    from nf.planning.profile import ProfileKey
    from nf.planning.search import bounds, candidate_of, search
    from nf.planning.search_record import record

    on, bench = where.on, where.bench
    assert on is not None
    assert bench is not None

    def vary(plan: PipelinePlan) -> list[Candidate]:
        if where.device is None:  # nothing can be measured that was not
            return []
        return [candidate_of(each, "neighbour", model, profile, loads) for each in neighbours(plan)]

    found = search(wanted, loads, bench, vary=vary, progress=lambda words: _say(args, words))
    key = ProfileKey(on.gpu, on.driver, on.kernels)
    head: dict[str, Any] = {"model": args.model, **asdict(key)}
    if profile is not None and profile.key != key:
        head["profile"] = asdict(profile.key)
    result = record(found, bounds(model, profile, loads), head)
    if not args.no_store:
        folder = Path(args.store) if args.store else None
        if profile is not None:
            _say(args, "predicting which plan is for which steps")
        best = [
            replace(plan, model=Path(args.model).name, gpu=on.gpu)
            for plan in covering_plans(found, model, profile, on.kv_tokens)
        ]
        result["stored"] = [str(path) for path in save_plans(best, model.config, on.gpu, result, folder=folder)]
    if args.plot is not None:
        assert where.device is not None
        _say(args, "tracing")
        _plot(args, model, where.device, found)
    return result


def _plot(args: argparse.Namespace, model: Model, device: Device, found: Search) -> None:
    """Fig. 10: the sequential plan and the one that gains most; if none does, the first that overlaps."""
    from nf.planning.gpu_step_bench import GpuStepBench
    from nf.planning.hardware import accelerator
    from nf.planning.usage_picture import traced, usage_picture

    before = found.sequential.candidate
    gains = [1 - best.ratio(found.sequential, number) for number, best in enumerate(found.best)]
    number = gains.index(max(gains))
    after, load = found.best[number].candidate, found.loads[number]
    if after.plan == before.plan:
        after = next((r.candidate for r in found.results if len(r.candidate.plan.streams) > 1), before)
    bench, card = GpuStepBench(model, device), accelerator("auto")
    steps = [
        traced(f"{c.plan.name} ({c.kind})", bench.trace(c.plan, load), model, load, card)
        for c in dict.fromkeys((before, after))
    ]
    Path(args.plot).write_text(usage_picture(steps, f"{args.model} on {card.label}"), encoding="utf-8")


def _predicted(
    args: argparse.Namespace, model: Model, profile: Profile | None, wanted: list[Candidate], loads: list[Load]
) -> dict[str, Any]:
    """Candidates that were not measured, in the form of a search's record."""
    from nf.planning.search import Result, Search, bounds
    from nf.planning.search_record import record

    results = tuple(Result(candidate) for candidate in wanted)
    source = "" if profile is None else "{gpu}, {driver}, {kernels}".format(**asdict(profile.key))
    head = {"model": args.model, "profile": source}
    return record(Search(tuple(loads), results, (results[0],) * len(loads)), bounds(model, profile, loads), head)


def _print(args: argparse.Namespace, result: dict[str, Any]) -> None:
    import json

    from nf.cli.plan_search_table import table

    print(json.dumps(result, indent=1) if args.json else "\n".join(table(result)))


def _say(args: argparse.Namespace, words: str) -> None:
    if not args.quiet:
        print(f"nf plan search: {words}", file=sys.stderr, flush=True)


def _shares(text: str) -> tuple[DecodeShare, ...]:
    """``0.3,0.5@450``: shares, some of them with the mean number of keys."""
    from nf.errors import InputError
    from nf.planning.loads import DecodeShare

    found = []
    try:
        for part in text.split(","):
            share, at, keys = part.partition("@")
            found.append(DecodeShare(float(share), int(keys) if at else None))
    except (ValueError, InputError):
        raise argparse.ArgumentTypeError(
            f"takes shares above 0 and at most 1 such as 0.1,0.3 or, with so many keys per decode token, 0.5@450, "
            f"not {text!r}"
        ) from None
    return tuple(found)
