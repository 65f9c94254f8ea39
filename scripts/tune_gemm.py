"""Choose GEMM configurations by measurement: candidates on the GPU, then the table kernels/gemm_table.json.

    python scripts/tune_gemm.py compile --bundle DIR                       # anywhere
    python scripts/tune_gemm.py measure --bundle DIR --sms 132 --out a.json    # on the GPU, needs cupy
    python scripts/tune_gemm.py reduce a.json [b.json …]                   # anywhere; writes the table

For every shape, number of rows and SM budget, the candidates that the cost rule thinks best are timed in turn with
cuBLAS, a few rounds each in a loop that keeps the card at its steady state. ``reduce`` then picks few configurations:
for every point one that is within 1 % of its best.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nf.bench.gemm_cases import MODELS
from nf.kernels.compile import compile_kernels, load_bundle
from nf.kernels.gemm import TABLE, Gemm, GemmChoice, GemmConfig, GemmKernels, configurations, cost

ROWS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192)
COPIES_BYTES = 160 << 20  # of W in rotation: more than L2 keeps
GRAPH_SECONDS, SLICE_SECONDS, ROUNDS = 2e-3, 0.02, 3
TOLERANCE = 1.015


def candidates() -> list[GemmConfig]:
    """Everything worth a try."""
    found = [GemmConfig(128, n, 2, 1) for n in (64, 80, 96, 128, 160, 192, 224, 256)]
    found += [GemmConfig(128, n, 1, 2) for n in (96, 128, 192, 256)]
    found += [GemmConfig(128, n, split=2) for n in (64, 96, 128, 160, 192, 256)]
    found += [GemmConfig(128, n, split=4) for n in (128, 192, 256)]
    found += [GemmConfig(256, n, *cluster) for n in (96, 128, 144, 160) for cluster in ((1, 1), (1, 2), (2, 1))]
    found += [GemmConfig(256, 192, 2, 1), GemmConfig(256, 96, split=2), GemmConfig(256, 128, split=2)]
    found += [GemmConfig(64, n, split=split, swap=True) for n in (16, 32, 64, 128) for split in (1, 2)]
    return found


def shortlist(n: int, k: int, rows: int, sms: int, configs: list[GemmConfig], count: int) -> list[GemmChoice]:
    """The ``count`` cheapest by the rule; the best of them also with other groups where there are many rows."""
    able = [c for c in configs if c.split * 64 <= k and (not c.swap or rows <= 256)]
    best = sorted(able, key=lambda config: cost(config, n, k, rows, sms))[:count]
    groups = [GemmChoice(config, group) for config in best[:2] for group in (4, 16)] if rows >= 2048 else []
    return [*(GemmChoice(config) for config in best), *groups]


def measure(args: argparse.Namespace) -> None:
    from nf.bench.kernels import environment

    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), **environment(), "points": []}
    configs = candidates() if args.all else list(configurations())
    kernels = GemmKernels(load_bundle([config.source("none") for config in configs], "sm_90a", args.bundle))
    started = time.monotonic()
    for model in args.models:
        for name in args.names:
            for point in _measure_shape(args, kernels, configs, model, name, started):
                record["points"].append(point)
                args.out.write_text(json.dumps(record) + "\n")  # what is measured is kept, whatever comes


def _measure_shape(
    args: argparse.Namespace, kernels: GemmKernels, configs: list[GemmConfig], model: str, name: str, started: float
) -> Iterator[dict[str, Any]]:
    import cupy

    from nf.bench import cublas
    from nf.graphs.partition import partitions

    n, k = MODELS[model][name]
    ws = [_normal(n, k) for _ in range(max(1, -(-COPIES_BYTES // (n * k * 2))))]
    for sms in args.sms:
        stream = cupy.cuda.Stream(non_blocking=True)
        if sms < cupy.cuda.Device().attributes["MultiProcessorCount"]:
            stream = cupy.cuda.ExternalStream(_STREAMS.setdefault(sms, None) or _keep(sms, partitions((sms,))[0].stream()))
        for rows in args.rows:
            if time.monotonic() - started > args.seconds:
                return
            x, y = _normal(rows, k), cupy.empty((rows, n), cupy.uint16)
            count = cupy.array([rows], cupy.int32)
            choices = shortlist(n, k, rows, sms, configs, args.count)
            gemms = [kernels.product(n, k, rows, sms=sms, choice=choice) for choice in choices]

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
            tail = " ".join(f"{c.config.label}/{c.group}:{t / reference:.3f}" for t, c in ranked[:4])
            print(f"{model} {name} {sms} SMs {rows} rows: cuBLAS {reference * 1e6:.1f} µs; {tail}", flush=True)


def _call(gemm: Gemm, pointers: dict[str, int], stream: int) -> None:
    gemm(**pointers, stream=stream)


_STREAMS: dict[int, int | None] = {}


def _keep(sms: int, stream: int) -> int:
    _STREAMS[sms] = stream
    return stream


def _in_turn(stream: Any, calls: list[list[Any]], estimate: float) -> list[float]:
    """Median seconds per call of each list of calls, measured in alternation."""
    import cupy

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
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(ROUNDS + 1):
            for i, (graph, count) in enumerate(graphs):
                replays = max(1, round(SLICE_SECONDS / (estimate * count)))
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                graph.launch(stream)
                start.record(stream)
                for _ in range(replays):
                    graph.launch(stream)
                end.record(stream)
                end.synchronize()
                if turn:  # the first round warms the card
                    times[i].append(cupy.cuda.get_elapsed_time(start, end) / 1e3 / replays / count)
    return [statistics.median(each) for each in times]


def _normal(rows: int, columns: int) -> Any:
    import cupy

    bits = (cupy.random.standard_normal((rows, columns), dtype=cupy.float32)).view(cupy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(cupy.uint16)


def reduce(files: list[Path]) -> dict[str, Any]:
    """Cover all points with few configurations: repeatedly the one that serves most of the points left within the
    tolerance, then for every point the fastest of those chosen."""
    records = [json.loads(file.read_text()) for file in files]
    # Of a point measured twice, the first file named counts.
    unique = {
        (point["n"], point["k"], point["sms"], point["rows"]): point
        for record in reversed(records)
        for point in record["points"]
    }
    points = sorted(unique.values(), key=lambda p: (p["model"], p["sms"], p["name"], p["rows"]))
    fits = [{c for c, _, t in p["times"] if t <= TOLERANCE * min(t for *_, t in p["times"])} for p in points]
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
        ratio = round(seconds / point["cublas"], 3)
        entries.append({**entry, "config": config, "group": group, "us": round(seconds * 1e6, 2), "cublas": ratio})
    keep = ("date", "gpu", "driver", "cublas", "commit", "note")
    measured = [{key: record[key] for key in keep if record.get(key) is not None} for record in records]
    return {"measured": measured, "entries": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("compile", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--bundle", type=Path, required=True)
        command.add_argument("--all", action="store_true", help="all candidates, not only those the table names")
        if name == "measure":
            command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
            command.add_argument("--names", nargs="+", default=list(MODELS["llama-3-8b"]), help="of products")
            command.add_argument("--sms", nargs="+", type=int, required=True)
            command.add_argument("--rows", nargs="+", type=int, default=ROWS)
            command.add_argument("--count", type=int, default=7, help="candidates per point")
            command.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
            command.add_argument("--out", type=Path, required=True)
    commands.add_parser("reduce").add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    if args.command == "compile":
        configs = candidates() if args.all else configurations()
        for artifact in compile_kernels([config.source("none") for config in configs], "sm_90a", folder=args.bundle):
            print(artifact.source.name, *artifact.resources)
    elif args.command == "measure":
        measure(args)
    else:
        table = reduce(args.files)
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
        TABLE.write_text(f'{{"measured": {json.dumps(table["measured"])},\n "entries": [\n{lines}\n ]}}\n')
        print(f"{len(table['entries'])} points, {len({e['config'] for e in table['entries']})} configurations")


if __name__ == "__main__":
    main()
