"""Choose GEMM configurations by measurement: candidates on the GPU, then the table kernels/gemm_table.json.

    python scripts/tune_gemm.py compile --bundle DIR                       # anywhere
    python scripts/tune_gemm.py measure --bundle DIR --sms 132 --out a.json    # on the GPU, needs cupy
    python scripts/tune_gemm.py reduce a.json [b.json …]                   # anywhere; writes the table

``--evict nf lf fl``, given to both of the first, also tries the best few with the L2 cache told what to drop.

For every shape, number of rows and SM budget, candidates are timed one after the other, each once the card has settled
at the clock that its power allows, between two timings of cuBLAS. Candidates are those that the cost rule thinks best,
and those that earlier records have near the best. ``reduce`` then picks few configurations: for every point one that is
within 2 % of its best, or 1 % for a full batch.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nf.bench.gemm_cases import HEADS, MODELS, partition_stream
from nf.bench.kernels import normal
from nf.cli.files import check_writable
from nf.cli.parser import CommandParser
from nf.errors import InputError, NfError
from nf.kernels.compile import compile_kernels, load_bundle
from nf.kernels.gemm import (
    EVICTIONS,
    TABLE,
    TILE_K,
    Epilogue,
    Gemm,
    GemmChoice,
    GemmConfig,
    GemmKernels,
    Output,
    configurations,
    cost,
)
from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource

Point = tuple[int, int, int, int]  # n, k, SMs, rows

ROWS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192)
HEAD = "lm_head"  # the last product, fp32 out
NAMES = (*MODELS["llama-3-8b"], HEAD)
COPIES_BYTES = 160 << 20  # of W in rotation: more than L2 keeps
GRAPH_SECONDS = 2e-3
WARM_SECONDS, SETTLE_SECONDS, SLICE_SECONDS = 0.3, 0.1, 0.12  # before a point; before each timing; each timing
NEAR = 1.05  # of an earlier record's best
TOLERANCE = 1.02  # of a point's best: what may be chosen for it
FULL_ROWS, FULL_TOLERANCE = 2048, 1.01  # a full batch, where most time goes
# What L2 keeps matters from so many rows on; so many candidates of a point are tried in other orders than GemmChoice's
# own, and with evictions.
EVICTING_ROWS, EVICTING = 1024, 2
GROUPS, EVICTING_GROUPS = (1, 4, 16), (1, 8)


def candidates() -> list[GemmConfig]:
    """Everything worth a try."""
    found = [GemmConfig(128, n) for n in (192, 224, 256)]  # an odd number of blocks of 128 rows
    found += [GemmConfig(128, n, 2, 1) for n in (64, 80, 96, 128, 160, 192, 224, 256)]
    found += [GemmConfig(128, n, 1, 2) for n in (96, 128, 192, 224, 256)]
    found += [GemmConfig(128, n, split=2) for n in (64, 96, 128, 160, 192, 256)]
    found += [GemmConfig(128, n, split=4) for n in (128, 192, 256)]
    found += [GemmConfig(256, n, *cluster) for n in (96, 128, 144, 160, 192) for cluster in ((1, 1), (1, 2), (2, 1))]
    found += [GemmConfig(256, 96, split=2), GemmConfig(256, 128, split=2)]
    found += [GemmConfig(*tile, 2, 2) for tile in ((128, 256), (256, 128), (256, 192))]
    found += [GemmConfig(64, n, split=split, swap=True) for n in (16, 32, 64, 128) for split in (1, 2)]
    found += [GemmConfig(64, 32, split=4, swap=True)]
    found += [GemmConfig(128, n, split=split, swap=True) for n in (16, 32, 64) for split in (2, 4) if n // split > 4]
    return found


def shortlist(
    n: int, k: int, rows: int, sms: int, configs: list[GemmConfig], count: int, epilogue: Epilogue, output: Output
) -> list[GemmConfig]:
    """The ``count`` cheapest by the rule."""
    able = [c for c in configs if c.split * TILE_K <= k and c.serves(epilogue, output) and (not c.swap or rows <= 256)]
    return sorted(able, key=lambda config: cost(config, n, k, rows, sms))[:count]


def near_the_best(files: list[Path]) -> dict[Point, list[GemmChoice]]:
    """What earlier records have near the best of each point, best first."""
    found: dict[Point, list[GemmChoice]] = {}
    for file in files:
        for point in read_record(file)["points"]:
            ranked = sorted((t, config, group) for config, group, t in point["times"])
            found[_key(point)] = [
                GemmChoice(GemmConfig.from_label(c), g) for t, c, g in ranked if t <= NEAR * ranked[0][0]
            ]
    return found


def _key(point: dict[str, Any]) -> Point:
    return point["n"], point["k"], point["sms"], point["rows"]


def measure(args: argparse.Namespace) -> None:
    check_writable("--out", args.out)
    record = new_record()
    configs = _configs(args)
    sources = _sources([*configs, *args.also], args.names, args.evict)
    kernels = GemmKernels(KernelLoader(load_bundle(sources, "sm_90a", args.bundle)))
    earlier = near_the_best(args.previous)
    started = time.monotonic()
    for model in args.models:
        for name in args.names:
            for point in _measure_shape(args, kernels, configs, earlier, model, name, started):
                record["points"].append(point)
                args.out.write_text(json.dumps(record) + "\n")  # what is measured is kept, whatever comes


def new_record(**more: Any) -> dict[str, Any]:
    """Where and when, and room for points.

    Raises:
        NfError: there is no GPU, or no cupy.
    """
    from nf.bench import cublas
    from nf.bench.environment import environment
    from nf.bench.measure import need_cupy
    from nf.device_choice import need_gpu

    need_gpu()
    need_cupy()
    here = environment()
    told = {name: here[name] for name in ("date", "commit", "driver")}
    return {**told, "gpu": here["gpus"][0]["name"], "cublas": cublas.version(), **more, "points": []}


def _configs(args: argparse.Namespace) -> list[GemmConfig]:
    if args.configs:
        return list(args.configs)
    return candidates() if args.all else list(configurations())


def _evicting(config: GemmConfig, evictions: list[str]) -> list[GemmConfig]:
    """Variants in which the L2 cache is told what to drop."""
    if config.swap or config.evict:  # few rows read W once, whatever L2 keeps
        return []
    return [replace(config, evict=evict) for evict in evictions]


def _with_evictions(configs: list[GemmConfig], evictions: list[str]) -> list[GemmConfig]:
    return configs + [variant for config in configs for variant in _evicting(config, evictions)]


def _config(label: str) -> GemmConfig:
    try:
        return GemmConfig.from_label(label)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes labels such as {configurations()[0].label}, not {label!r}") from None


def _sources(configs: list[GemmConfig], names: list[str], evictions: list[str]) -> list[KernelSource]:
    """Plain products with the outputs that the products named have."""
    configs = _with_evictions(configs, evictions)
    outputs: list[Output] = ["bfloat16"] if set(names) - {HEAD} else []
    outputs += ["float32"] if HEAD in names else []
    return [c.source("none", output) for output in outputs for c in configs if c.serves("none", output)]


def _measure_shape(
    args: argparse.Namespace,
    kernels: GemmKernels,
    configs: list[GemmConfig],
    earlier: dict[Point, list[GemmChoice]],
    model: str,
    name: str,
    started: float,
) -> Iterator[dict[str, Any]]:
    import cupy

    from nf.bench import cublas

    n, k = HEADS[model] if name == HEAD else MODELS[model][name]
    output: Output = "float32" if name == HEAD else "bfloat16"
    epilogue: Epilogue = "swiglu" if name == "gate_up" else "none"  # that it must serve; the plain product is timed
    ws = [normal(n, k) for _ in range(max(1, -(-COPIES_BYTES // (n * k * 2))))]
    compiled = _with_evictions(configs, args.evict)
    for sms in args.sms:
        stream = cupy.cuda.Stream(non_blocking=True)
        if sms < cupy.cuda.Device().attributes["MultiProcessorCount"]:
            stream = cupy.cuda.ExternalStream(partition_stream(sms))
        for rows in args.rows:
            if time.monotonic() - started > args.seconds:
                return
            x, y = normal(rows, k), cupy.empty((rows, n), "f4" if name == HEAD else "u2")
            count = cupy.array([rows], cupy.int32)
            known = [c for c in earlier.get((n, k, sms, rows), []) if c.config in compiled]
            rule = shortlist(n, k, rows, sms, configs, args.count, epilogue, output)
            choices = _choices([*known, *map(GemmChoice, rule)][: args.count], rows, args.evict)
            choices += [c for c in map(GemmChoice, args.also) if c.config.serves(epilogue, output) and c not in choices]
            gemms = [kernels.product(n, k, rows, sms=sms, choice=choice, output=output) for choice in choices]

            pointers = {"x": x.data.ptr, "y": y.data.ptr, "rows": count.data.ptr}
            calls = [[cublas.gemm(x, w, y) for w in ws]]
            calls += [[functools.partial(_call, gemm, {**pointers, "w": w.data.ptr}) for w in ws] for gemm in gemms]
            cupy.cuda.Device().synchronize()  # the buffers were filled on another stream
            reference, *times = _in_turn(stream, calls, 2 * rows * n * k / 600e12 + n * k * 2 / 4.5e12)
            yield {
                "model": model, "name": name, "n": n, "k": k, "sms": sms, "rows": rows, "cublas": reference,
                "times": [[c.config.label, c.group, t] for c, t in zip(choices, times, strict=True)],
            }  # fmt: skip
            ranked = sorted(zip(times, choices, strict=True), key=lambda pair: pair[0])
            tail = " ".join(f"{c.config.label}/{c.group}:{t / reference:.3f}" for t, c in ranked[:5])
            print(f"{model} {name} {sms} SMs {rows} rows: cuBLAS {reference * 1e6:.1f} µs; {tail}", flush=True)


def _choices(found: list[GemmChoice], rows: int, evictions: list[str]) -> list[GemmChoice]:
    """What is tried at a point: ``found``, and of the first of them other orders and evictions where there are many
    rows."""
    more: list[GemmChoice] = []
    if rows >= EVICTING_ROWS:
        plain = list(dict.fromkeys(replace(choice.config, evict="") for choice in found))[:EVICTING]
        more += [GemmChoice(config, group) for config in plain for group in GROUPS]
        told = [variant for config in plain for variant in _evicting(config, evictions)]
        more += [GemmChoice(config, group) for config in told for group in EVICTING_GROUPS]
    return list(dict.fromkeys([*found, *more]))


def _call(gemm: Gemm, pointers: dict[str, int], stream: int) -> None:
    gemm.launch(**pointers, stream=stream)


def _in_turn(stream: Any, calls: list[list[Any]], estimate: float) -> list[float]:
    """Seconds per call of each list of calls; of the first list, the mean of a timing before and one after the rest."""
    with stream:
        graphs = []
        for each in calls:
            for call in each:
                call(stream.ptr)
            stream.synchronize()
            stream.begin_capture()
            repeats = max(1, round(GRAPH_SECONDS / estimate / len(each)))
            for _ in range(repeats):
                for call in each:
                    call(stream.ptr)
            graphs.append((stream.end_capture(), repeats * len(each)))
        _replays(stream, *graphs[0], WARM_SECONDS, estimate)
        first, *times, last = (_settled(stream, *graph, estimate) for graph in [*graphs, graphs[0]])
    return [(first + last) / 2, *times]


def _settled(stream: Any, graph: Any, count: int, estimate: float) -> float:
    estimate = _replays(stream, graph, count, SETTLE_SECONDS, estimate)
    return _replays(stream, graph, count, SLICE_SECONDS, estimate)


def _replays(stream: Any, graph: Any, count: int, seconds: float, estimate: float) -> float:
    """Seconds per call in about ``seconds`` of replays of a graph of ``count`` calls."""
    import cupy

    replays = max(1, round(seconds / (estimate * count)))
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    for _ in range(replays):
        graph.launch(stream)
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / replays / count


def reduce(files: list[Path], only: set[str] | None = None) -> dict[str, Any]:
    """Cover all points with few configurations: repeatedly the one that serves most of the points left within the
    tolerance, then for every point the fastest of those chosen. ``only`` names those there are to choose from."""
    # Of a point measured twice the later record counts; of the same day, the first file named.
    records = sorted(map(read_record, files), key=lambda record: record["date"], reverse=True)
    unique = {_key(point): point for record in reversed(records) for point in record["points"]}
    for point in unique.values():
        point["times"] = [time for time in point["times"] if only is None or time[0] in only]
    with_times = (point for point in unique.values() if point["times"])
    points = sorted(with_times, key=lambda p: (p["model"], p["sms"], p["name"], p["rows"]))
    if not points:
        raise InputError("--only" if only else "files", "leave no point of which there is a time")
    fits = [_fit(point) for point in points]
    chosen: set[str] = set()
    left = list(range(len(points)))
    while left:
        counts: dict[str, int] = {}
        for index in left:
            for config in fits[index]:
                counts[config] = counts.get(config, 0) + 1
        chosen.add(max(sorted(counts), key=lambda config: counts[config]))
        left = [index for index in left if not fits[index] & chosen]
    entries = []
    for point in points:
        seconds, config, group = min((t, c, g) for c, g, t in point["times"] if c in chosen)
        entry = {key: point[key] for key in ("model", "name", "n", "k", "sms", "rows")}
        if point["cublas"] is not None:  # else the seconds are those of a layer or a step
            entry |= {"us": round(seconds * 1e6, 2), "cublas": round(seconds / point["cublas"], 3)}
        entries.append({**entry, "config": config, "group": group})
    keep = ("date", "gpu", "driver", "cublas", "commit", "note")
    measured = [{key: record[key] for key in keep if record.get(key) is not None} for record in records]
    return {"measured": measured, "entries": entries}


def read_record(file: Path) -> dict[str, Any]:
    """What was measured.

    Raises:
        InputError: names the file, if it is none.
    """
    try:
        record = json.loads(file.read_text())
        sound = isinstance(record["date"], str) and all(map(_is_point, record["points"]))
    except OSError as error:
        raise InputError(str(file), error.strerror or "cannot be read") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise InputError(str(file), "is no record of this script's")
    return record


def _is_point(point: dict[str, Any]) -> bool:
    for label, *_ in point["times"]:
        GemmConfig.from_label(label)
    positive = all(group >= 1 and seconds > 0 for _, group, seconds in point["times"])
    return positive and {"model", "name", "n", "k", "sms", "rows", "cublas"} <= point.keys()


def _fit(point: dict[str, Any]) -> set[str]:
    tolerance = FULL_TOLERANCE if point["rows"] == FULL_ROWS else TOLERANCE
    best = min(seconds for *_, seconds in point["times"])
    return {config for config, _, seconds in point["times"] if seconds <= tolerance * best}


def main() -> None:
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("compile", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--bundle", type=Path, required=True)
        command.add_argument("--all", action="store_true", help="all candidates, not only those the table names")
        command.add_argument("--configs", nargs="+", type=_config, metavar="LABEL", help="these candidates")
        command.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, help="of products")
        command.add_argument(
            "--evict", nargs="+", choices=EVICTIONS[1:], default=[], metavar="XW", help="evictions to try: nf, lf, fl"
        )
        command.add_argument(
            "--also",
            nargs="*",
            type=_config,
            default=[],
            metavar="LABEL",
            help="configurations to try at every point",
        )
        if name == "measure":
            command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
            command.add_argument("--previous", nargs="*", type=Path, default=[], help="records that name candidates")
            command.add_argument("--sms", nargs="+", type=int, required=True)
            command.add_argument("--rows", nargs="+", type=int, default=ROWS)
            command.add_argument("--count", type=int, default=7, help="candidates per point")
            command.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
            command.add_argument("--out", type=Path, required=True)
    reducing = commands.add_parser("reduce")
    reducing.add_argument("files", nargs="+", type=Path)
    reducing.add_argument("--only", nargs="+", metavar="LABEL", help="choose among these, e.g. those that passed tests")
    args = parser.parse_args()
    try:
        {"compile": compile_bundle, "measure": measure, "reduce": write_table}[args.command](args)
    except NfError as error:
        parser.exit(1, f"tune_gemm: {error}\n")


def compile_bundle(args: argparse.Namespace) -> None:
    sources = _sources([*_configs(args), *args.also], args.names, args.evict)
    if not sources:
        raise InputError("--configs", "cannot serve any of the products")
    for artifact in compile_kernels(sources, "sm_90a", folder=args.bundle):
        for used in artifact.resources:
            print(f"{artifact.source.name}: {used.registers} registers, {used.stack_bytes} B of stack")


def write_table(args: argparse.Namespace) -> None:
    table = reduce(args.files, set(args.only) if args.only else None)
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    TABLE.write_text(f'{{"measured": {json.dumps(table["measured"])},\n "entries": [\n{lines}\n ]}}\n')
    print(f"{len(table['entries'])} points, {len({e['config'] for e in table['entries']})} configurations")


if __name__ == "__main__":
    main()
