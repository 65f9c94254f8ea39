"""Choose GEMM configurations of a plan by the time of a whole step.

Beside decode attention a product has less of L2 and of the power than alone, so what is fastest alone on so many SMs
need not be fastest there.

    python scripts/tune_gemm_step.py llama-3-8b --plan plan.json --out a.json      # on the GPU

Every product of every nano-batch is tried in the configurations that the cost rule thinks best, the others at the best
known then; what makes the step clearly faster stays. The record goes to ``tune_gemm.py reduce``; its seconds are those
of the step. Kernels come from the cache or a bundle, as for ``nf generate``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tune_gemm import GROUPS, new_record, shortlist

from nf.bench.gemm_cases import MODELS
from nf.bench.steady_step import Load
from nf.cli.files import check_writable
from nf.cli.parser import CommandParser
from nf.errors import InputError, NfError
from nf.graphs.plan import PipelinePlan, load_plan
from nf.kernels.gemm import Epilogue, GemmChoice, choose, configurations, prefer
from nf.models.shapes import SHAPES, shape

EPILOGUES: dict[str, Epilogue] = {"gate_up": "swiglu", "down": "residual", "qkv": "none", "o": "residual"}
"""As a layer runs them, the longest first."""
WORTH = 0.002  # relative: two measurements of one step differ by up to about as much


def places(plan: PipelinePlan) -> list[tuple[str, int, int]]:
    """(product, rows, SMs) of the plan's products on partitions, the largest nano-batch first."""
    found = {
        (item.operation.removesuffix("_proj"), stop - start, stream.sms)
        for stream in plan.streams
        if stream.sms != "all"
        for item in stream.nano_operations
        for start, stop in [plan.nano_batches[item.nano_batch]]
    }
    names = list(EPILOGUES)
    return sorted((place for place in found if place[0] in names), key=lambda p: (-p[1], names.index(p[0])))


def candidates(name: str, n: int, k: int, rows: int, sms: int, count: int) -> list[GemmChoice]:
    """The choice there is first, then the ``count`` best by the rule, each in the first order."""
    epilogue = EPILOGUES[name]
    rule = shortlist(n, k, rows, sms, list(configurations()), count, epilogue, "bfloat16")
    return list(dict.fromkeys([choose(n, k, rows, sms, epilogue), *(GemmChoice(c, GROUPS[0]) for c in rule)]))


def descend(model: str, plan: PipelinePlan, step: Callable[[], float], count: int) -> Iterator[dict[str, Any]]:
    """A point per place: the step's seconds with each candidate there, the others at the best known then.

    Args:
        step: measures one, with what ``choose`` says then.
    """
    best = step()
    for name, rows, sms in places(plan):
        n, k = MODELS[model][name]
        choice, *others = candidates(name, n, k, rows, sms, count)
        times = {choice: best}
        for other in others:
            prefer(n, k, rows, sms, other)
            times[other] = step()
            if times[other] < best * (1 - WORTH):
                choice, best = other, times[other]
        prefer(n, k, rows, sms, choice)
        yield {
            "model": model, "name": name, "n": n, "k": k, "sms": sms, "rows": rows, "cublas": None,
            "times": [[one.config.label, one.group, seconds] for one, seconds in times.items()],
        }  # fmt: skip
        print(
            f"{name}, {rows} rows on {sms} SMs: {choice.config.label}/{choice.group}, {1e3 * best:.2f} ms", flush=True
        )


def measure(args: argparse.Namespace) -> None:
    from nf.kernels.device import Device
    from nf.models.registry import declare
    from nf.planning.gpu_step_bench import GpuStepBench

    model = declare(shape(args.model))
    plan = load_plan(args.plan, model.operations)
    if not places(plan):
        raise InputError(str(args.plan), "has no GEMM on a partition, so there is nothing to tune")
    record = new_record(note="seconds of a whole step")
    bench = GpuStepBench(model, Device(), quick=True)
    loads = [Load(plan.dense_batch_size, args.input_len, args.output_len)]
    end = time.monotonic() + args.seconds
    for point in descend(args.model, plan, lambda: bench.measure(plan, loads)[0].seconds, args.count):
        record["points"].append(point)
        args.out.write_text(json.dumps(record) + "\n")
        if time.monotonic() > end:
            break


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS.keys() & SHAPES.keys()))
    parser.add_argument("--plan", type=Path, required=True, help="with GEMMs on a partition")
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--count", type=int, default=4, help="configurations per product")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        check_writable("--out", args.out)
        measure(args)
    except NfError as error:
        parser.exit(1, f"tune_gemm_step: {error}\n")


if __name__ == "__main__":
    main()
