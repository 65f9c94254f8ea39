"""``nf plan search``: find the fastest pipeline plan for a model on this machine's GPU, and keep it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf.cli.files import check_picture, check_writable
from nf.cli.options import named_by_flag
from nf.cli.plan_profile import measured_profile, the_gpu

if TYPE_CHECKING:
    from nf.bench.steady_step import Load
    from nf.kernels.device import Device
    from nf.models.declaration import Model
    from nf.planning.kept_steps import KeptSteps, MeasuredOn
    from nf.planning.profile import Profile
    from nf.planning.search import Candidate

DESCRIPTION = """\
Profile a model's nano-operations, look for the pipelines that should be the fastest (Stages I and
II of NanoFlow, with power as a further resource), measure these and the sequential plan as whole
steps at steady state, and keep the fastest: engines take it by themselves from then on. "Do not
overlap" is among the candidates, and wins where nothing is clearly faster.
"""

EXAMPLES = """\
examples:
  nf plan search llama-3-8b --quick
  nf plan search ./llama --dense-batch-size 4096 --decode-share 0.1,0.3,0.5,0.7
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
    add("--decode-share", type=_shares, default=(), metavar="X,…", help="decode tokens of a step, one load per share")
    add("--count", type=int, default=6, metavar="K", help="plans of Stages I and II to measure (default 6)")
    add("--seconds", type=float, default=100.0, metavar="S", help="for Stages I and II (default 100)")
    add("--add", action="append", default=[], metavar="FILE", help="measure this plan too; may be repeated")
    add("--quick", action="store_true", help="profile in at most 3 minutes")
    add("--profile", metavar="FILE", help="take this profile and measure no nano-operation")
    add("--predict-only", action="store_true", help="measure no step; with --profile no GPU is needed")
    add("--results", metavar="FILE", help="keep measured steps there as they come; measure none that it has")
    add("--measured", metavar="FILE", help="take the steps that --results kept and measure none; no GPU needed")
    add("--plans-dir", metavar="DIR", help="write the candidates there, as plan files")
    add("--store", metavar="DIR", help="keep the fastest plan there (default: where engines look for it)")
    add("--no-store", action="store_true", help="keep nothing")
    add("--plot", metavar="FILE", help="draw a step's use of the GPU, sequential and chosen plan (SVG)")
    add("--json", action="store_true", help="as one JSON object")
    add("-q", "--quiet", action="store_true", help="say nothing on the way")


def run(args: argparse.Namespace) -> int:
    from nf.cli.estimate import model_config
    from nf.errors import InputError
    from nf.graphs.plan_store import shape_name
    from nf.models.registry import declare
    from nf.planning.integer_program import solver
    from nf.planning.kept_steps import open_steps, read_steps
    from nf.planning.loads import loads as all_loads

    check_picture(args.plot)
    if args.count < 0:
        raise InputError("--count", f"must be at least 0, got {args.count}")
    if args.kv_tokens is not None and args.kv_tokens < 1:
        raise InputError("--kv-tokens", f"must be at least 1, got {args.kv_tokens}")
    if not args.seconds >= 0:
        raise InputError("--seconds", f"must be at least 0, got {args.seconds:g}")
    not_measuring = [flag for flag in ("--predict-only", "--measured") if getattr(args, flag[2:].replace("-", "_"))]
    if not_measuring and args.plot is not None:
        raise InputError("--plot", f"needs a step that runs; leave out {not_measuring[0]}")
    if len(not_measuring) == 2 or (not_measuring and args.results is not None):
        raise InputError(not_measuring[0], f"cannot be used with {[*not_measuring, '--results'][1]}")
    check_writable("--results", args.results)
    if args.measured is not None:
        args.count = 0  # what was measured is what there is
    if args.count:
        solver()  # before anything is measured for it
    if args.plans_dir is not None:
        Path(args.plans_dir).mkdir(parents=True, exist_ok=True)
    model = declare(model_config(args.model))
    kept = read_steps(Path(args.measured), shape_name(model.config)) if args.measured is not None else None
    needs_gpu = kept is None and (not args.predict_only or args.profile is None)
    device = the_gpu(model) if needs_gpu else None
    on = kept.on if kept is not None else None if device is None else _measured_on(model, device)
    if args.results is not None and on is not None:
        kept = open_steps(Path(args.results), on)
    with named_by_flag():
        room = on.kv_tokens if on is not None and args.kv_tokens is None else args.kv_tokens
        loads = all_loads(args.dense_batch_size, args.input_len, args.output_len, args.decode_share, room)
    profile, wanted = _candidates(args, model, loads, device, kept)
    if args.plans_dir is not None:
        _write_plans(Path(args.plans_dir), wanted)
    if args.predict_only:
        _print(args, _predicted(args, model, profile, wanted, loads))
        return 0
    assert on is not None
    return _measure(args, model, device, on, kept, profile, wanted, loads)


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
    args: argparse.Namespace, model: Model, loads: list[Load], device: Device | None, kept: KeptSteps | None
) -> tuple[Profile | None, list[Candidate]]:
    """What is worth measuring and the profile that says so; the user's files are read before the GPU is used."""
    from nf.graphs.plan import load_plan
    from nf.graphs.plan_store import shape_name
    from nf.planning.profile_file import read_profile
    from nf.planning.search import candidates

    profile = read_profile(Path(args.profile), shape_name(model.config)) if args.profile is not None else None
    sms = device.sms if device is not None else kept.on.gpu_sms if kept is not None else 0
    sms = sms or (profile.gpu_sms if profile is not None else 0)
    assert sms  # without a GPU there is a profile, or what was measured
    more = [load_plan(file, model.operations, args.dense_batch_size, gpu_sms=sms) for file in args.add]
    if kept is not None and device is None:
        more += [plan for plan in kept.plans if plan.dense_batch_size == args.dense_batch_size]
    if profile is None and device is not None and args.count:
        _say(args, "profiling nano-operations")
        profile = measured_profile(model, device, args.dense_batch_size, quick=args.quick, quiet=args.quiet)[0]
    if (
        profile is not None
        and (largest := max((rows for _, rows, *_ in profile.solos), default=0)) < args.dense_batch_size
    ):
        _say(args, f"the profile ends at {largest:,} rows; what is beyond is extrapolated")
    if profile is not None and args.count:
        _say(args, "Stages I and II")
    wanted = candidates(model, profile, loads, sms, count=args.count, seconds=args.seconds, more=more)
    return profile, wanted


def _write_plans(folder: Path, wanted: list[Candidate]) -> None:
    for number, candidate in enumerate(wanted):
        (folder / f"{number:02}.json").write_text(candidate.plan.to_json(), encoding="utf-8")


def _measure(
    args: argparse.Namespace,
    model: Model,
    device: Device | None,
    on: MeasuredOn,
    kept: KeptSteps | None,
    profile: Profile | None,
    wanted: list[Candidate],
    loads: list[Load],
) -> int:
    """On ``device``; None takes what was ``kept``."""
    from nf.planning.gpu_step_bench import GpuStepBench
    from nf.planning.profile import ProfileKey
    from nf.planning.search import bounds, search
    from nf.planning.search_record import record

    gpu_bench = GpuStepBench(model, device) if device is not None else None
    if kept is not None:
        kept.bench = gpu_bench
    bench = kept or gpu_bench
    assert bench is not None
    found = search(wanted, loads, bench, progress=lambda words: _say(args, words))
    key = ProfileKey(on.gpu, on.driver, on.kernels)
    head: dict[str, Any] = {"model": args.model, **asdict(key)}
    if profile is not None and profile.key != key:
        head["profile"] = asdict(profile.key)
    result = record(found, bounds(model, profile, loads), head)
    if not args.no_store:
        from nf.graphs.plan_store import save_plan

        folder = Path(args.store) if args.store else None
        best = replace(found.best.candidate.plan, model=Path(args.model).name, gpu=on.gpu)
        result["stored"] = str(save_plan(best, model.config, on.gpu, result, folder=folder))
    if args.plot is not None:
        _say(args, "tracing")
        _plot(args, model, gpu_bench, [found.sequential.candidate, found.best.candidate], wanted, loads[0])
    _print(args, result)
    return 0


def _plot(
    args: argparse.Namespace, model: Model, bench: Any, chosen: list[Candidate], wanted: list[Candidate], load: Load
) -> None:
    """Fig. 10: the sequential plan and the chosen one; if they are the same, the first that overlaps."""
    from nf.planning.hardware import accelerator
    from nf.planning.usage_picture import traced, usage_picture

    before, after = chosen
    if after is before or after.plan == before.plan:
        after = next((c for c in wanted if len(c.plan.streams) > 1), before)
    card = accelerator("auto")
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
    return record(Search(tuple(loads), results, results[0]), bounds(model, profile, loads), head)


def _print(args: argparse.Namespace, result: dict[str, Any]) -> None:
    import json

    from nf.cli.plan_search_table import table

    print(json.dumps(result, indent=1) if args.json else "\n".join(table(result)))


def _say(args: argparse.Namespace, words: str) -> None:
    if not args.quiet:
        print(f"nf plan search: {words}", file=sys.stderr, flush=True)


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError(f"takes shares above 0 and below 1 such as 0.1,0.3, not {text!r}")
    return shares
