"""``nf plan shares``: NanoFlow's own search over a stored profile, with a share of the GPU for every nano-operation."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nf.planning.shares import Shares
    from nf.planning.structure import StructureSearch

DESCRIPTION = """\
Stages I and II of NanoFlow as in the paper: cut and order a layer's nano-operations as if none
slowed another down, then give each of them a share of the GPU. A pipeline plan cannot express such
shares, as its streams have SMs and its nano-operations have not; this says what they would be
worth. No GPU needed.
"""

EXAMPLES = """\
examples:
  nf plan shares llama-3-8b --profile h200.json
  nf plan shares llama-3-8b --profile docs/examples/a100-nanoflow.json --dense-batch-size 1024 \\
      --input-len 788 --output-len 473
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory, a hub name, or a shape such as llama-3-8b")
    add("--profile", metavar="FILE", required=True, help="what was measured; see nf plan profile")
    add("--dense-batch-size", type=int, default=2048, metavar="N", help="tokens per step (default 2048)")
    add("--input-len", type=int, default=1024, metavar="N", help="tokens of a prompt (default 1024)")
    add("--output-len", type=int, default=512, metavar="N", help="tokens generated (default 512)")
    add("--seconds", type=float, default=60.0, metavar="S", help="for both stages together (default 60)")
    add("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    import json

    from nf.cli.estimate import model_config
    from nf.cli.options import named_by_flag
    from nf.errors import InputError
    from nf.graphs.plan_store import shape_name
    from nf.models.registry import declare
    from nf.planning.loads import batch_shape, loads
    from nf.planning.nano_layer import profiled_costs
    from nf.planning.profile_file import read_profile
    from nf.planning.resources import curves_of_lanes
    from nf.planning.shares import share_candidates
    from nf.planning.structure import search_structures

    if not args.seconds > 0:
        raise InputError("--seconds", f"must be above 0, got {args.seconds:g}")
    model = declare(model_config(args.model))
    profile = read_profile(Path(args.profile), shape_name(model.config))
    with named_by_flag():
        (load,) = loads(args.dense_batch_size, args.input_len, args.output_len)
    batch = batch_shape(load)
    curves = curves_of_lanes(profile, model.operations)
    if not curves:
        raise InputError(args.profile, "has no two nano-operations beside each other; shares follow from these")
    cost_of = profiled_costs(profile, batch)
    structures = search_structures(model.operations, batch, cost_of, seconds=args.seconds / 2)
    shares = share_candidates(
        structures.structures, curves, power=profile.power_limit, seconds=args.seconds / 2, count=2
    )[0]
    alone = sum(cost_of(o, batch.rows(o, 0, batch.tokens), "all").seconds for o in model.operations)
    result = as_json(args.model, alone, structures, shares)
    print(json.dumps(result, indent=1) if args.json else "\n".join(table(result)))
    return 0


def as_json(model: str, alone: float, structures: StructureSearch, shares: Shares) -> dict[str, Any]:
    """Plain data: seconds per layer, shares of the GPU.

    Args:
        alone: seconds of all operations one after the other.
    """
    tasks = zip(shares.rounds.layer.tasks, shares.shares, shares.starts, shares.seconds, strict=True)
    found = [
        {
            "operation": task.operation.name,
            "tokens": [task.start, task.stop],
            "stream": task.lane,
            "share": share,
            "start_s": start,
            "seconds": seconds,
        }
        for task, share, start, seconds in tasks
        if task.cost.seconds
    ]
    return {
        "model": model,
        "sequential_s": alone,
        "stage_1": {"period_s": structures.best.period, "bound_s": structures.bound, "tried": structures.tried},
        "stage_2": {
            "period_s": shares.period,
            "bound_s": shares.bound,
            "joules": None if math.isnan(shares.joules) else shares.joules,
        },
        "nano_operations": sorted(found, key=lambda item: item["start_s"]),
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result for people, nano-operations as they start in a steady round."""
    one, two = result["stage_1"], result["stage_2"]
    yield f"{result['model']}, ms per layer at steady state"
    yield f"  one after the other     {1e3 * result['sequential_s']:8.4f}"
    tried = f"   bound {1e3 * one['bound_s']:.4f} over all ways to cut; {one['tried']} of them tried"
    yield f"  Stage I, undisturbed    {1e3 * one['period_s']:8.4f}{tried}"
    yield f"  Stage II, with shares   {1e3 * two['period_s']:8.4f}   bound {1e3 * two['bound_s']:.4f} for this order"
    yield ""
    yield f"  {'nano-operation':<34}{'stream':<9}{'share':>6}{'start':>11}{'takes':>11}"
    for item in result["nano_operations"]:
        name = "{operation} [{tokens[0]}, {tokens[1]})".format(**item)
        yield (
            f"  {name:<34}{item['stream']:<9}{item['share']:>6.2f}"
            f"{1e3 * item['start_s']:>8.3f} ms{1e3 * item['seconds']:>8.3f} ms"
        )
