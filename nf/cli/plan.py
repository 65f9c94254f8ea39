"""``nf plan``: look at a pipeline plan, check one, find the fastest; estimate what a model costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nf.cli import estimate, plan_profile, plan_search, plan_shares
from nf.cli.files import check_picture
from nf.cli.options import named_by_flag
from nf.cli.parser import add_common_options

if TYPE_CHECKING:  # the commands import what they need when they run
    from nf.graphs.plan import PipelinePlan
    from nf.models.declaration import Model
    from nf.models.operations import Operation

_DESCRIPTION = """\
A pipeline plan says which nano-operation (an operation of a layer on a part of the dense batch)
runs when, and on which stream. What has to wait for what is derived from the model's operations.
"""

_EXAMPLES = """\
examples:
  nf plan show nano-batch                       one round of the plan with two nano-batches
  nf plan show nano-batch --layers 3            every round of a model with three layers
  nf plan show nano-batch --json > mine.json    a plan to start from
  nf plan validate mine.json --gpu-sms 132
  nf plan search llama-3-8b --quick             the fastest plans on this GPU, measured and kept
  nf plan search llama-3-8b --profile h200.json --predict-only      predicted, without a GPU
  nf plan estimate llama-3-8b --gpu h200        what bounds a model on a machine
"""

_SHOW_EXAMPLES = """\
examples:
  nf plan show sequential --model ./mixtral
  nf plan show nano-batch --dense-batch-size 512 --layers 2
  nf plan show mine.json --model llama-3-8b --profile h200.json --plot mine.svg
"""


_VALIDATE_EXAMPLES = """\
examples:
  nf plan show nano-batch --json > mine.json
  nf plan validate mine.json --gpu-sms 132
"""


def add_parser(subparsers: Any) -> None:
    """Add ``plan`` with its commands."""
    parser = subparsers.add_parser(
        "plan", help="show, check or search a pipeline plan, estimate a model's cost", description=_DESCRIPTION
    )
    parser.epilog = _EXAMPLES
    commands = parser.add_subparsers(dest="plan_command", metavar="COMMAND", title="commands", required=True)

    show = commands.add_parser("show", help="print what runs when", description="Print a plan as a timeline.")
    show.epilog = _SHOW_EXAMPLES
    show.add_argument("plan", metavar="PLAN", help="sequential, nano-batch, or a JSON file")
    _add_model(show)
    show.add_argument("--layers", type=int, metavar="N", help="show every round of N layers (default: a typical round)")
    show.add_argument(
        "--dense-batch-size", type=int, metavar="N", help="tokens per step (default: 2048, or the file's own)"
    )
    show.add_argument("--json", action="store_true", help="print the plan as JSON")
    show.add_argument("--plot", metavar="FILE", help="draw it as a timeline (SVG)")
    show.add_argument("--profile", metavar="FILE", help="take the lengths of the drawing from this profile")
    show.add_argument("--input-len", type=int, default=1024, metavar="N", help="of the drawing's load (default 1024)")
    show.add_argument("--output-len", type=int, default=512, metavar="N", help="of the drawing's load (default 512)")
    add_common_options(show)

    check = commands.add_parser(
        "validate",
        help="check a plan file",
        description="Check that a plan runs every operation on every token once and cannot deadlock.",
    )
    check.epilog = _VALIDATE_EXAMPLES
    check.add_argument("file", metavar="FILE", help="JSON file")
    _add_model(check)
    check.add_argument("--gpu-sms", type=int, metavar="N", help="SMs the plan's partitions must fit into")
    add_common_options(check)

    for name, module, line in (
        ("profile", plan_profile, "measure a model's nano-operations on this GPU"),
        ("search", plan_search, "find the fastest plans on this GPU"),
        ("shares", plan_shares, "a share of the GPU per nano-operation, from a profile"),
    ):
        command = commands.add_parser(name, help=line, description=module.DESCRIPTION)
        command.epilog = module.EXAMPLES
        module.add_arguments(command)
        add_common_options(command)

    cost = commands.add_parser("estimate", help="say what a model costs on a machine", description=estimate.DESCRIPTION)
    cost.epilog = estimate.EXAMPLES
    estimate.add_arguments(cost)
    add_common_options(cost)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="whose operations to plan (default: the bundled model)")


def run(args: argparse.Namespace) -> int:
    """Run ``nf plan …``; a plan that is not valid is a PlanError."""
    run_command = {
        "show": _show,
        "validate": _validate,
        "profile": plan_profile.run,
        "search": plan_search.run,
        "shares": plan_shares.run,
        "estimate": estimate.run,
    }[args.plan_command]
    return run_command(args)


def _show(args: argparse.Namespace) -> int:
    from nf.cli.timeline import timeline
    from nf.errors import InputError

    if args.layers is not None and not 1 <= args.layers <= 1000:
        raise InputError("--layers", f"must be 1 to 1000, got {args.layers}")
    check_picture(args.plot)
    if args.profile is not None and args.plot is None:
        raise InputError("--profile", "is for the drawing; add --plot FILE")
    model = _model(args.model)
    operations = model.operations
    plan = _load(args.plan, operations, args.dense_batch_size)
    if args.plot is not None:
        _plot(args, plan, model)
    print(plan.to_json() if args.json else timeline(plan, operations, args.layers), end="")
    return 0


def _plot(args: argparse.Namespace, plan: PipelinePlan, model: Model) -> None:
    """Lengths are a profile's, or all the same."""
    from pathlib import Path

    from nf.planning.plan_picture import SecondsOf, plan_picture, profiled_lengths, unit_lengths

    lengths: SecondsOf = unit_lengths
    if args.profile is not None:
        from nf.graphs.plan_store import shape_name
        from nf.planning.loads import batch_shape, loads
        from nf.planning.profile_file import read_profile

        profile = read_profile(Path(args.profile), shape_name(model.config))
        with named_by_flag():
            (load,) = loads(plan.dense_batch_size, args.input_len, args.output_len)
        lengths = profiled_lengths(profile, plan, batch_shape(load))
    Path(args.plot).write_text(plan_picture(plan, model.operations, lengths, args.layers), encoding="utf-8")


def _validate(args: argparse.Namespace) -> int:
    from nf.errors import InputError

    if args.gpu_sms is not None and args.gpu_sms < 1:
        raise InputError("--gpu-sms", f"must be at least 1, got {args.gpu_sms}")
    plan = _load(args.file, _model(args.model).operations, None, gpu_sms=args.gpu_sms)
    count = sum(len(stream.nano_operations) for stream in plan.streams)
    print(
        f'valid: plan "{plan.name}" runs {count} nano-operations per layer on {len(plan.streams)} stream(s), '
        f"{plan.dense_batch_size} tokens in {len(plan.nano_batches)} nano-batch(es)"
    )
    return 0


def _load(
    name: str, operations: tuple[Operation, ...], dense_batch_size: int | None, *, gpu_sms: int | None = None
) -> PipelinePlan:
    """A built-in plan is made for the engine's own batch size where none is given."""
    from nf.config import EngineConfig
    from nf.graphs.plan import BUILT_IN, load_plan

    if dense_batch_size is None and name in BUILT_IN:
        dense_batch_size = EngineConfig().max_num_batched_tokens
    if dense_batch_size is None:
        return load_plan(name, operations, gpu_sms=gpu_sms)
    with named_by_flag():
        return load_plan(name, operations, dense_batch_size, gpu_sms=gpu_sms)


def _model(model: str | None) -> Model:
    from nf.cli.estimate import model_config
    from nf.hub import BUNDLED_MODEL
    from nf.models.registry import declare

    return declare(model_config(BUNDLED_MODEL if model is None else model))
