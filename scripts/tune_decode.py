"""Which ring decode attention should have on few SMs (``ON_FEW_SMS`` in kernels/decode_attention.py), by page size.

    python scripts/tune_decode.py compile --out kernels   # anywhere: every kernel, and decode attention for all rings
    NF_KERNEL_BUNDLE=kernels python scripts/tune_decode.py measure --out rings.json --plan plan.json   # on the GPU

Every ring on every partition, spread over the GPU as plans have it: alone, beside a GEMM on the other SMs, and by the
time of whole steps under the plans that are given. A bundle has what was compiled for it; on the GPU nothing is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from nf.bench.environment import environment, write_record
from nf.bench.steady_step import Load
from nf.cli.files import check_writable
from nf.cli.parser import CommandParser
from nf.errors import InputError, NfError
from nf.graphs.pipeline_plan import PAIR, PipelinePlan
from nf.graphs.plan import load_plan
from nf.kernels import decode_attention
from nf.kernels.decode_attention import Ring
from nf.kernels.kv_cache import PAGE_SIZES
from nf.kernels.source import KernelSource
from nf.models.declaration import Model
from nf.models.registry import declare
from nf.models.shapes import SHAPES, shape
from nf.planning.profiling import quick_extent

RINGS = (Ring(12, 2, 8192), Ring(8, 3, 8192), Ring(7, 4, 8192), Ring(6, 4, 8192), Ring(7, 2, 16384), Ring(6, 2, 16384))
"""The first is today's. Together a CTA's stages have at most 227 KB."""
TOKENS, ROWS, CONTEXT = 2048, 512, 1280  # of the largest step, of attention, of a row
GEMM, GEMM_ROWS = "gate_up_proj", 1024


@contextmanager
def using(ring: Ring) -> Iterator[None]:
    """Kernels that are listed, loaded and launched meanwhile have this ring on few SMs."""
    before, decode_attention.ON_FEW_SMS = decode_attention.ON_FEW_SMS, ring
    try:
        yield
    finally:
        decode_attention.ON_FEW_SMS = before


def models() -> list[str]:
    """Shapes with the product that attention is measured beside."""
    return sorted(name for name in SHAPES if GEMM in {o.name for o in declare(shape(name)).operations})


def sources() -> list[KernelSource]:
    """Every kernel, and decode attention in the tiles of every ring."""
    from nf.kernels.registry import all_sources

    found = dict.fromkeys(all_sources())
    for ring in RINGS:
        with using(ring):
            found |= dict.fromkeys(decode_attention.sources())
    return list(found)


def compile_all(args: argparse.Namespace) -> None:
    from nf.kernels.compile import compile_kernels

    print(f"{len(compile_kernels(sources(), args.arch, folder=args.out))} kernels in {args.out}")


def points(
    model: Model, device: Any, partitions: Sequence[int], ring: Ring, page_size: int
) -> Iterator[dict[str, Any]]:
    """Bytes per second of attention with ``ring`` on each partition, alone and beside a GEMM, and what that keeps."""
    from nf.planning.gpu_bench import GpuBench

    work = ROWS * CONTEXT * model.config.num_kv_heads * model.config.head_dim * 2 * 2  # K and V, bf16
    extent = quick_extent(TOKENS, device.sms)
    with using(ring), closing(GpuBench(model.config, extent, device, page_size=page_size)) as bench:
        for sms in partitions:
            own, other = ("decode_attention", ROWS, sms, CONTEXT), (GEMM, GEMM_ROWS, device.sms - sms, 0)
            alone, gemm_alone, both = bench.solo(own), bench.solo(other), bench.co_run(other, own)
            yield {
                "ring": [ring.warps, ring.stages, ring.stage_bytes],
                "sms": sms,
                "alone_bytes_per_second": work / alone.seconds,
                "beside_bytes_per_second": work / both.second.seconds,
                "gemm_keeps": gemm_alone.seconds / both.first.seconds,
                "watts_together": both.watts,
            }


def steps(
    model: Model, device: Any, plans: Sequence[PipelinePlan], load: Load, ring: Ring, page_size: int
) -> list[float]:
    """Seconds of a step under each plan."""
    from nf.planning.gpu_step_bench import GpuStepBench

    with using(ring):
        bench = GpuStepBench(model, device, quick=True, page_size=page_size)
        return [bench.measure(plan, [load])[0].seconds for plan in plans]


def measure(args: argparse.Namespace) -> None:
    from nf.device_choice import need_gpu
    from nf.kernels.device import Device

    model = declare(shape(args.model))
    plans = [load_plan(file, model.operations, TOKENS) for file in args.plan]
    load = Load(TOKENS, args.input_len, args.output_len)
    need_gpu(model)
    device = Device()
    record: dict[str, Any] = {"benchmark": "decode rings", "environment": environment(), "model": args.model}
    record |= {"rows": ROWS, "context": CONTEXT, "gemm": [GEMM, GEMM_ROWS], "plans": args.plan}
    record |= {"page_size": args.page_size, "points": []}
    for ring in args.ring or RINGS:
        for point in points(model, device, args.sms, ring, args.page_size):
            record["points"].append(point)
            print(
                f"{ring.warps} × {ring.stages} × {ring.stage_bytes // 1024:2} KB on {point['sms']:2} SMs: "
                f"{point['alone_bytes_per_second'] / 1e12:.2f} TB/s alone, "
                f"{point['beside_bytes_per_second'] / 1e12:.2f} beside a GEMM, which keeps {point['gemm_keeps']:.2f}",
                flush=True,
            )
        if plans:
            seconds = steps(model, device, plans, load, ring, args.page_size)
            record.setdefault("steps", []).append({"ring": record["points"][-1]["ring"], "seconds": seconds})
            print("  steps: " + ", ".join(f"{1e3 * value:.2f} ms" for value in seconds), flush=True)
        write_record(args.out, record)  # at once: it may be stopped before its end


def _ring(text: str) -> Ring:
    known = {f"{ring.warps}x{ring.stages}x{ring.stage_bytes // 1024}": ring for ring in RINGS}
    if text not in known:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, not {text!r}")
    return known[text]


def main() -> int:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compiling = commands.add_parser("compile", help="make a kernel bundle with decode attention for every ring")
    compiling.add_argument("--arch", default="sm_90a")
    compiling.add_argument("--out", type=Path, required=True, metavar="DIR")
    compiling.set_defaults(run=compile_all)
    measuring = commands.add_parser("measure", help="on the GPU")
    measuring.add_argument("--model", choices=models(), default="llama-3-8b")
    measuring.add_argument("--sms", type=int, nargs="+", default=[12, 16, 20, 24], help="partitions of attention")
    measuring.add_argument("--plan", nargs="*", default=[], metavar="FILE", help="plans for steps of 2,048 tokens")
    measuring.add_argument("--ring", type=_ring, nargs="+", metavar="WxSxKB", help="of these alone, such as 7x2x16")
    measuring.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=16, help="tokens (default 16)")
    measuring.add_argument("--input-len", type=int, default=1024)
    measuring.add_argument("--output-len", type=int, default=512)
    measuring.add_argument("--out", type=Path, required=True, metavar="FILE")
    measuring.set_defaults(run=measure)
    args = parser.parse_args()
    try:
        if args.run is measure:
            for sms in args.sms:
                if not 0 < sms <= decode_attention.FEW_SMS or sms % PAIR:
                    raise InputError(
                        "--sms",
                        f"must be even and at most {decode_attention.FEW_SMS}, the most that are few, not {sms}",
                    )
            check_writable("--out", args.out)
        args.run(args)
    except NfError as error:
        print(f"tune_decode: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
