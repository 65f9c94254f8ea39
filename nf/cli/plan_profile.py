"""``nf plan profile``: measure a model's nano-operations on this machine's GPU, alone and in pairs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nf.cli.files import check_picture
from nf.files import make_folder

if TYPE_CHECKING:
    from nf.kernels.device import Device
    from nf.models.declaration import Model
    from nf.planning.profile import Profile
    from nf.planning.profiling import Filled

LINE_SECONDS = 5.0  # between lines of progress

DESCRIPTION = """\
Measure what every nano-operation of a model takes on this machine's GPU: time and energy alone,
over batch sizes and numbers of SMs, and how much a GEMM and decode attention slow each other down.
What was measured with the same GPU, driver and kernels is kept, so an interrupted run goes on.
"""

EXAMPLES = """\
examples:
  nf plan profile llama-3-8b --quick
  nf plan profile llama-3-8b --quick --profiles-dir out      on a borrowed machine: out/ is fetched
  nf plan profile ./mixtral --dense-batch-size 1024 --plot curves.svg
  nf plan profile llama-3-8b --profile measured.json --plot curves.svg      draw only, no GPU
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, a hub name, or a shape such as llama-3-8b")
    parser.add_argument("--dense-batch-size", type=int, default=2048, metavar="N", help="largest step (default 2048)")
    parser.add_argument("--quick", action="store_true", help="four batch sizes and six partitions, at most 3 minutes")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="measure for so long at most; the rest is left (default 690; 150 with --quick)",
    )
    parser.add_argument("--profiles-dir", metavar="DIR", help="keep profiles there (default: in the cache's folder)")
    parser.add_argument("--plot", metavar="FILE", help="draw what runs beside a GEMM keeps of its speed (SVG)")
    parser.add_argument("--profile", metavar="FILE", help="take this profile and measure nothing")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from nf.cli.estimate import model_config
    from nf.errors import InputError
    from nf.graphs.plan_store import shape_name
    from nf.models.registry import declare
    from nf.planning.profile_file import read_profile

    check_picture(args.plot)
    if args.seconds is not None and not args.seconds >= 0:
        raise InputError("--seconds", f"must be at least 0, got {args.seconds:g}")
    model = declare(model_config(args.model))
    if args.profile is not None:
        profile = read_profile(Path(args.profile), shape_name(model.config))
        print(f"{len(profile.solos)} points alone and {len(profile.co_runs)} pairs in {args.profile}")
    else:
        device = the_gpu(model)
        folder = None if args.profiles_dir is None else make_folder("--profiles-dir", args.profiles_dir)
        profile, filled, path = measured_profile(
            model,
            device,
            args.dense_batch_size,
            quick=args.quick,
            quiet=args.quiet,
            seconds=args.seconds,
            folder=folder,
        )
        failed = f", {filled.failed} could not be" if filled.failed else ""
        left = f"; {filled.left} left: run it again to go on" if filled.left else ""
        print(f"{filled.measured} points measured{failed}, {filled.known} known before{left}")
        print(path)
    if args.plot is not None:
        from nf.planning.curve_picture import curve_picture, curves_of

        title = f"{args.model} on {profile.key.gpu}: beside a GEMM"
        Path(args.plot).write_text(curve_picture(curves_of(profile, model.operations), title), encoding="utf-8")
    return 0


def the_gpu(model: Model) -> Device:
    """This machine's GPU, if it can run ``model``.

    Raises:
        NfError: there is none, or it cannot.
    """
    from nf.device_choice import need_gpu
    from nf.kernels.device import Device

    need_gpu(model)

    return Device()


def profile_folder() -> Path:
    """Where profiles measured on this machine are kept."""
    from nf.kernels.compile import cache_dir

    return cache_dir() / "profiles"


def measured_profile(
    model: Model,
    device: Device,
    dense_batch_size: int,
    *,
    quick: bool,
    quiet: bool,
    seconds: float | None = None,
    folder: Path | None = None,
) -> tuple[Profile, Filled, Path]:
    """The profile of ``model`` on ``device``, with what is missing measured now, for ``seconds`` at most, and kept in
    ``folder``, the cache's if None."""
    from nf.graphs.plan_store import shape_name
    from nf.planning.gemm_trend import gemm_trend
    from nf.planning.gpu_bench import GpuBench, profile_key
    from nf.planning.profile import Profile
    from nf.planning.profile_file import load_profile, save_profile
    from nf.planning.profiling import (
        FULL_SECONDS,
        QUICK_SECONDS,
        Filled,
        fill,
        full_extent,
        missing_points,
        quick_extent,
        wanted_solos,
    )

    folder, key, name = folder or profile_folder(), profile_key(device), shape_name(model.config)
    extent = (quick_extent if quick else full_extent)(dense_batch_size, device.sms)
    profile = load_profile(folder, key, name) or Profile(key, name, device.sms)
    missing = missing_points(profile, model.operations, extent)
    wanted = [*profile.solos, *wanted_solos(model.operations, extent)]
    profile.trend = gemm_trend(model, wanted, device.sms)
    path = folder / key.file_name
    if not missing.count:
        return profile, Filled(0, missing.known, 0), path
    most = QUICK_SECONDS if quick else FULL_SECONDS
    bench = GpuBench(model.config, extent, device)
    try:
        profile.idle_watts, profile.cap_watts = _known(bench.idle_watts), _known(bench.cap_watts)
        with _bar(missing.count, quiet) as progress, ending_on_sigterm():
            filled = fill(
                profile,
                bench,
                model.operations,
                extent,
                save=lambda profile: save_profile(folder, profile),
                seconds=most if seconds is None else seconds,
                progress=progress,
            )
    finally:
        bench.close()
    return profile, filled, path


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that what was measured is kept."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _known(value: float) -> float | None:
    return value if value == value else None


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Points as they are measured, on stderr; where that is no terminal, a line every few seconds."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        unit=" points",
        dynamic_ncols=True,
        disable=quiet,
        mininterval=0.1 if terminal else LINE_SECONDS,
        bar_format=None if terminal else "nf plan profile: {n_fmt} of {total_fmt} points, {elapsed}{postfix}\n",
    ) as bar:

        def progress(words: str) -> None:
            bar.set_postfix_str(words, refresh=False)
            bar.update()

        yield progress
