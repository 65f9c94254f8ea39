"""Options that say which requests a benchmark makes; the same for every engine that is measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nf.errors import InputError

if TYPE_CHECKING:
    from nf.bench.workload import Workload

_LENGTHS = ("input_len", "output_len")
_LIMITS = ("max_input_len", "max_output_len", "max_total_len")


def add_workload_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the group "requests" and return it."""
    group = parser.add_argument_group("requests")
    group.add_argument("--num-prompts", type=int, default=64, metavar="N", help="how many (default 64)")
    group.add_argument("--input-len", type=int, metavar="N", help="tokens of each prompt (default 512)")
    group.add_argument("--output-len", type=int, metavar="N", help="tokens of each output (default 128)")
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="draw lengths from a CSV file (ContextTokens, GeneratedTokens)"
    )
    group.add_argument("--max-input-len", type=int, metavar="N", help="of the trace, skip longer prompts")
    group.add_argument("--max-output-len", type=int, metavar="N", help="of the trace, skip longer outputs")
    group.add_argument("--max-total-len", type=int, metavar="N", help="of the trace, skip longer sums of both")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of lengths, token ids, arrivals (default 0)")
    return group


def read_workload(args: argparse.Namespace) -> Workload:
    """The requests that were asked for.

    Raises:
        InputError: an option is out of its range or does not go with another, or the trace is wrong.
    """
    from nf.bench.workload import Limits, constant, from_trace

    for name in ("num_prompts", *_LENGTHS, *_LIMITS):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(_flag(name), f"must be at least 1, not {getattr(args, name)}")
    if args.seed < 0:
        raise InputError("--seed", f"must be at least 0, not {args.seed}")
    for name in _LIMITS if args.trace is None else _LENGTHS:
        if getattr(args, name) is not None:
            only = "is for lengths from --trace FILE"
            raise InputError(_flag(name), only if args.trace is None else "cannot be used with --trace")
    if args.trace is None:
        return constant(args.input_len or 512, args.output_len or 128, args.num_prompts, args.seed)
    limits = Limits(args.max_input_len, args.max_output_len, args.max_total_len)
    return from_trace(args.trace, args.num_prompts, args.seed, limits)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
