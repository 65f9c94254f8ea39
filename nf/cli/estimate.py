"""``nf plan estimate``: what a model costs on a machine, as a table or JSON, and the paper's figures as heat maps."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf.cli.files import check_picture

if TYPE_CHECKING:
    from nf.config import ModelConfig
    from nf.planning.cost_model import Estimate, Rates
    from nf.planning.hardware import Accelerator
    from nf.planning.operation_costs import OperationCost

DESCRIPTION = """\
Say what serving a model costs on a machine, and what bounds it: equations 1 to 5 of NanoFlow
(arXiv 2408.12757), every operation's arithmetic, memory and network traffic, and bounds on the
throughput, that of the power cap included where the card's energy was measured. Needs no GPU.
"""

EXAMPLES = """\
examples:
  nf plan estimate llama-3-8b --gpu h200
  nf plan estimate llama-3-70b --gpu h200 --tp 8 --input-len 1024 --output-len 512 --json
  nf plan estimate qwen2-7b --gpu a100-80gb --plot figures.svg

the paper's Table 2:
  nf plan estimate llama-2-70b --gpu a100-80gb --tp 8 --input-len 512 --output-len 1024 \\
      --dense-batch-size 2048 --counting paper
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory, a hub name, or a shape such as llama-3-8b")
    add("--gpu", default="auto", metavar="NAME", help="h200, a100-80gb, …; auto (default) reads this machine's")
    add("--tp", type=int, default=1, metavar="N", help="GPUs that share the model (default 1)")
    add("--input-len", type=float, default=1024, metavar="N", help="mean tokens of a prompt (default 1024)")
    add("--output-len", type=float, default=512, metavar="N", help="mean tokens generated (default 512)")
    add("--dense-batch-size", type=int, metavar="N", help="tokens per step (default: as many as memory allows)")
    add("--counting", default="engine", metavar="NAME", help="engine (default) or paper: what operations are counted")
    add("--plot", metavar="FILE", help="draw Figs. 2 and 3 of the paper, and this model, as heat maps (SVG)")
    add("--json", action="store_true", help="as one JSON object, in SI units")


def run(args: argparse.Namespace) -> int:
    import json

    from nf.errors import InputError, shown
    from nf.models.registry import declare
    from nf.planning.cost_model import Machine, estimate
    from nf.planning.hardware import accelerator
    from nf.planning.operation_costs import Counting, Workload

    if args.counting not in [*Counting]:
        raise InputError("--counting", f"must be one of {', '.join(Counting)}, not {shown(args.counting)}")
    check_picture(args.plot)
    model = declare(model_config(args.model))
    found = estimate(
        model,
        Machine(accelerator(args.gpu), args.tp),
        Workload(args.input_len, args.output_len),
        dense_batch=args.dense_batch_size,
        counting=Counting(args.counting),
    )
    if args.plot is not None:
        _plot(Path(args.plot), Path(args.model).name, found)
    print(json.dumps(as_json(args.model, found), indent=2) if args.json else "\n".join(lines(args.model, found)))
    return 0


def model_config(name: str) -> ModelConfig:
    """The shape of a model by directory, shape name or hub name; of the hub's no weights are downloaded.

    Raises:
        ModelError: it is none of these, or its configuration cannot be used.
    """
    from nf.errors import ModelError, shown
    from nf.hub import BUNDLED_MODEL, resolve_model
    from nf.models.hf_config import read_config
    from nf.models.shapes import SHAPES

    if name in SHAPES and not Path(name).is_dir():
        return SHAPES[name]
    if name != BUNDLED_MODEL and "/" not in name and not (name and Path(name).exists()):
        known = ", ".join(SHAPES)
        raise ModelError("MODEL", f"must be a directory, a hub name like org/name or one of {known}, not {shown(name)}")
    return read_config(resolve_model(name, config_only=True))


def _plot(file: Path, name: str, found: Estimate) -> None:
    from nf.planning.figures import memory_figure, network_figure
    from nf.planning.heat_map import heat_maps

    machine = found.machine
    figures = [
        network_figure((name, found.model)),
        memory_figure(machine.accelerator, (name, found.model, machine.gpus)),
    ]
    file.write_text(heat_maps(figures), encoding="utf-8")


def lines(name: str, found: Estimate) -> Iterator[str]:
    """The estimate for people to read, at most 100 columns."""
    workload, machine, a = found.workload, found.machine, found.machine.accelerator
    yield f"{name} on {machine.gpus} × {a.label}, {workload.input_len:g} tokens in and {workload.output_len:g} out"
    yield ""
    yield from _sizes(found)
    yield ""
    yield f"Equations 1 to 4 at {found.dense_batch:,.0f} tokens: {found.bound}-bound"
    times = (found.compute_time, found.memory_time, found.network_time)
    for label, seconds in zip(("compute", "memory", "network"), times, strict=True):
        yield f"  {label:<8} {1e3 * seconds:>10.3f} ms   {seconds / found.compute_time:6.3f} of compute"
    yield ""
    yield from _operation_table(found)
    yield ""
    yield from _bounds_table(found)


def _sizes(found: Estimate) -> Iterator[str]:
    from nf.planning.operation_costs import VALUE_BYTES, kv_bytes_per_token

    total, active, memory = found.parameters, found.active_parameters, found.machine.memory
    mixture = f", {active / 1e9:.2f} G of them active" if active != total else ""
    weights = VALUE_BYTES * total
    kv = kv_bytes_per_token(found.model.config, found.machine.gpus)
    batch = f"{found.max_requests:,.0f} requests decode, {found.max_dense_batch:,.0f} tokens per step"
    rows = [
        ("parameters", f"{total / 1e9:.2f} G{mixture}"),
        (
            "memory",
            f"{memory / 1e9:,.0f} GB, of which weights {weights / 1e9:,.1f} GB; KV {kv / 1e3:,.1f} kB per token",
        ),
        ("full memory", batch),
        ("B_dense", f"{found.dense_batch:,.0f} tokens, of which {found.requests:,.0f} decode"),
        ("GEMMs", f"compute-bound from {found.compute_bound_batch:,} tokens per step"),
    ]
    return (f"{label:<13}{text}" for label, text in rows)


def _operation_table(found: Estimate) -> Iterator[str]:
    from nf.planning.cost_model import bound

    rates = found.machine.rates
    yield f"One step by the data sheet, all layers and GPUs (counting: {found.counting})"
    units = (
        ("GFLOP", 11),
        ("memory GB", 11),
        ("network GB", 12),
        ("compute ms", 12),
        ("memory ms", 11),
        ("network ms", 12),
    )
    yield f"  {'operation':<19}" + "".join(f"{unit:>{width}}" for unit, width in units) + "  bound"
    for cost in (*found.operations, found.total):
        times = rates.times(cost)
        values = (cost.flops / 1e9, cost.memory_bytes / 1e9, cost.network_bytes / 1e9, *(1e3 * t for t in times))
        digits = (1, 2, 2, 3, 3, 3)
        cells = (f"{v:>{w},.{d}f}" for v, (_, w), d in zip(values, units, digits, strict=True))
        yield f"  {cost.name:<19}{''.join(cells)}  {bound(times)}"


def _bounds_table(found: Estimate) -> Iterator[str]:
    yield "Throughput at most, tokens/s per GPU, input and output"
    for bound_ in bounds(found):
        joules = f"   {bound_['joules_per_token']:.4f} J/token" if "joules_per_token" in bound_ else ""
        yield f"  {bound_['name']:<52}{bound_['tokens_per_s_per_gpu']:>12,.0f}{joules}"
    measured = found.machine.accelerator.measured
    if measured.source:
        yield f"  measured: {measured.source}"
    if measured.power is None:
        yield "  no bound from power: the energy of this accelerator was not measured"


def bounds(found: Estimate) -> list[dict[str, Any]]:
    """How fast it can be under each assumption, as plain data."""
    from nf.planning.cost_model import optimal_throughput

    a, rates, measured = found.machine.accelerator, found.machine.rates, found.machine.measured_rates
    rows: list[dict[str, Any]] = []

    def add(name: str, throughput: float, joules_per_step: float | None = None) -> None:
        row: dict[str, Any] = {"name": name, "tokens_per_s_per_gpu": throughput}
        if joules_per_step is not None:
            row["joules_per_token"] = joules_per_step / found.dense_batch
        rows.append(row)

    add("Throughput_opt (Eq. 5), data sheet", optimal_throughput(a.compute, found.active_parameters))
    add("every operation overlapped, data sheet", found.throughput(found.overlapped_time(rates)))
    add("operations one after the other, data sheet", found.throughput(found.sequential_time(rates)))
    if a.measured.compute is not None:
        add("Throughput_opt (Eq. 5), measured GEMM", optimal_throughput(a.measured.compute, found.active_parameters))
    if measured != rates:
        add("every operation overlapped, measured", found.throughput(found.overlapped_time(measured)))
        add("operations one after the other, measured", found.throughput(found.sequential_time(measured)))
    power, power_time = a.measured.power, found.power_time()
    if power is not None and power_time is not None:
        add(
            f"power roofline, {power.cap_watts:g} W",
            found.throughput(power_time),
            power_time * power.cap_watts * found.machine.gpus,
        )
    return rows


def as_json(name: str, found: Estimate) -> dict[str, Any]:
    """The estimate as plain data: bytes, FLOPs, seconds, tokens."""
    from dataclasses import asdict

    from nf.planning.cost_model import bound
    from nf.planning.operation_costs import VALUE_BYTES, kv_bytes_per_token

    rates = found.machine.rates
    operations = [
        {**asdict(cost), **_times(rates, cost), "bound": str(bound(rates.times(cost)))}
        for cost in (*found.operations, found.total)
    ]
    return {
        "model": name,
        "machine": {"gpus": found.machine.gpus, **_hardware(found.machine.accelerator)},
        "workload": asdict(found.workload),
        "counting": str(found.counting),
        "parameters": found.parameters,
        "active_parameters": found.active_parameters,
        "weight_bytes": VALUE_BYTES * found.parameters,
        "kv_bytes_per_token": kv_bytes_per_token(found.model.config, found.machine.gpus),
        "max_requests": found.max_requests,
        "max_dense_batch_size": found.max_dense_batch,
        "dense_batch_size": found.dense_batch,
        "requests": found.requests,
        "compute_bound_batch_size": found.compute_bound_batch,
        "compute_s": found.compute_time,
        "memory_s": found.memory_time,
        "network_s": found.network_time,
        "memory_ratio": found.memory_ratio,
        "network_ratio": found.network_ratio,
        "bound": str(found.bound),
        "operations": operations[:-1],
        "total": operations[-1],
        "bounds": bounds(found),
    }


def _times(rates: Rates, cost: OperationCost) -> dict[str, float]:
    return dict(zip(("compute_s", "memory_s", "network_s"), rates.times(cost), strict=True))


def _hardware(accelerator: Accelerator) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(accelerator)
