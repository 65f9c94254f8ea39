"""``nf bench``: measure the kernels on this machine's GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Measure every kernel against a reference in the same run, at steady state: clocks settled, buffers
larger than the cache, random data, and the card's own energy counter. A score is the kernel's speed
over the reference's.
"""

_EXAMPLES = """\
examples:
  nf bench kernels                              all of them
  nf bench kernels --only gemm --output gemm.json
"""


def add_parser(subparsers: Any) -> None:
    """Add ``bench`` with its command ``kernels``."""
    parser = subparsers.add_parser("bench", help="measure kernels", description=_DESCRIPTION, epilog=_EXAMPLES)
    commands = parser.add_subparsers(dest="bench_command", metavar="COMMAND", title="commands", required=True)
    kernels = commands.add_parser(
        "kernels", help="every kernel against a reference", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    kernels.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="gemm, moe, decode_attention, prefill_attention, memory or sampling; may be repeated",
    )  # fmt: skip
    kernels.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the rows as JSON as well")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when all was measured, whatever the figures say."""
    from nf.bench.kernels import CASES, line, run, write
    from nf.cli.info import gpu_devices
    from nf.errors import InputError, NfError

    for name in args.only:
        if name not in CASES:
            raise InputError("--only", f"must be one of {', '.join(CASES)}, not {name!r}")
    gpus, reason = gpu_devices()
    if not gpus:
        raise NfError(f"needs a GPU: {reason}")
    rows = run(args.only, lambda row: print(line(row), flush=True))
    missed = sum(not row.holds for row in rows)
    print(f"{len(rows)} cases, {missed} below their floor", file=sys.stderr)
    if args.output:
        write(rows, args.output)
    return 0
