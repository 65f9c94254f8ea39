"""``nf bench``: measure the engine and the kernels on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from nf.cli import bench_engine
from nf.cli.files import check_writable
from nf.cli.parser import add_common_options

_DESCRIPTION = """\
Measure the whole engine (throughput, latency) or the GPU kernels alone (kernels).
"""

_EXAMPLES = """\
examples:
  nf bench throughput                           the bundled model
  nf bench latency ./llama --request-rate 1 2 4 8
  nf bench kernels --only gemm --json gemm.json
"""

_KERNELS_DESCRIPTION = """\
Measure every kernel against a reference in the same run, at steady state: clocks settled, buffers
larger than the cache, random data, and the card's own energy counter. A score is the kernel's speed
over the reference's. Takes 3 to 4 minutes, and one more if the kernels have to be compiled first
(nf compile).
"""

_KERNELS_EXAMPLES = """\
examples:
  nf bench kernels                              all of them
  nf bench kernels --only gemm --json gemm.json
"""


def add_parser(subparsers: Any) -> None:
    """Add ``bench`` with its commands ``throughput``, ``latency`` and ``kernels``."""
    parser = subparsers.add_parser(
        "bench", help="measure throughput, latency, kernels", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    commands = parser.add_subparsers(dest="bench_command", metavar="COMMAND", title="commands", required=True)
    bench_engine.add_parsers(commands)
    kernels = commands.add_parser(
        "kernels", help="every kernel against a reference", description=_KERNELS_DESCRIPTION, epilog=_KERNELS_EXAMPLES
    )
    kernels.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="gemm, moe, decode_attention, prefill_attention, memory, sampling or launch; may be repeated",
    )  # fmt: skip
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write a record of everything")
    for command in commands.choices.values():
        add_common_options(command)


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when all was measured, whatever the figures say."""
    commands = {"throughput": bench_engine.throughput, "latency": bench_engine.latency, "kernels": _kernels}
    return commands[args.bench_command](args)


def _kernels(args: argparse.Namespace) -> int:
    from nf.bench.environment import write_record
    from nf.bench.kernels import CASES, Row, line, record, run
    from nf.device_choice import need_gpu
    from nf.errors import InputError

    for name in args.only:
        if name not in CASES:
            raise InputError("--only", f"must be one of {', '.join(CASES)}, not {name!r}")
    check_writable("--json", args.json)
    need_gpu()
    rows: list[Row] = []
    start = time.perf_counter()
    try:
        for row in run(args.only):
            print(line(row), flush=True)
            rows.append(row)
    finally:  # what was measured is kept, whatever comes
        if args.json is not None and rows:
            write_record(args.json, record(rows))
    missed, seconds = sum(not row.holds for row in rows), time.perf_counter() - start
    print(f"{len(rows)} cases in {seconds:.0f} s, {missed} below their floor", file=sys.stderr)
    return 0
