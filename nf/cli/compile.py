"""``nf compile``: compile every kernel, into the cache or into a bundle that loads without any compiler."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from nf.cli.options import named_by_flag

_DESCRIPTION = """\
Compile every kernel for a GPU architecture, on any machine: neither a GPU nor a driver is needed.
Without --out the kernels go to the cache, where they are looked for; with --out they make a kernel
bundle, a folder that another machine loads without a compiler (NF_KERNEL_BUNDLE=FOLDER). What is
there already and still right is kept; what a bundle has of other versions of nf is removed.
"""

_EXAMPLES = """\
examples:
  nf compile --arch sm_90a                      fill the cache before the first run
  nf compile --arch sm_90a --out kernels-h200   a bundle to deploy
"""


def add_parser(subparsers: Any) -> None:
    """Add ``compile``."""
    parser = subparsers.add_parser(
        "compile", help="compile the GPU kernels ahead of time", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    parser.add_argument("--arch", default="sm_90a", metavar="ARCH", help="GPU architecture (default: sm_90a)")
    parser.add_argument("--out", type=_folder, metavar="DIR", help="folder of a kernel bundle (default: the cache)")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="compiler processes (default: one per core)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Compile; 0 once every kernel is there."""
    from tqdm import tqdm

    from nf.kernels.compile import cache_dir, compile_kernels, prune
    from nf.kernels.registry import all_sources

    sources = all_sources()
    start, compiled = time.perf_counter(), 0
    with tqdm(desc="compiled", unit=" kernels", disable=args.quiet or not sys.stderr.isatty()) as bar:

        def progress(_name: str) -> None:
            nonlocal compiled
            compiled += 1
            bar.update()

        with named_by_flag(folder="--out"):
            artifacts = compile_kernels(sources, args.arch, folder=args.out, processes=args.jobs, progress=progress)
    if args.out:
        prune(sources, args.arch, args.out)
    if not args.quiet:
        size = sum(artifact.path.stat().st_size for artifact in artifacts)
        where = args.out or cache_dir() / "kernels"
        print(
            f"{len(artifacts)} kernels for {args.arch} in {where} ({size / 1e6:.1f} MB): {compiled} compiled in "
            f"{time.perf_counter() - start:.1f} s, {len(artifacts) - compiled} were there",
            file=sys.stderr,
        )
    return 0


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)
