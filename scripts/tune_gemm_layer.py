"""Choose GEMM configurations for few rows by the time of a whole layer.

With so few rows a product lasts some 10 µs, and what it costs depends on how the next one's first reads overlap with
its end.

    python scripts/tune_gemm_layer.py compile --bundle DIR                   # anywhere
    python scripts/tune_gemm_layer.py measure --bundle DIR --out a.json      # on the GPU, needs cupy

Starts from what the table has or one configuration for all products, whatever is faster, then tries the others for one
product after the other, twice, and keeps what is faster. The record goes to ``tune_gemm.py reduce``; its seconds are
those of the layer, and it leaves no choice: the best of each product is so beside the best of the others. With
``--evict``, given to both, candidates tell the L2 cache what to drop, e.g. W, so that it keeps x (``nf``).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tune_gemm import new_record

from nf.bench import cublas
from nf.bench.gemm_cases import MODELS
from nf.bench.kernels import normal
from nf.bench.measure import Call, measure
from nf.cli.parser import CommandParser
from nf.errors import NfError
from nf.kernels.compile import compile_kernels, load_bundle
from nf.kernels.gemm import EVICTIONS, GemmChoice, GemmConfig, GemmKernels, choose, configurations
from nf.kernels.load import KernelLoader

ROWS = (16, 32, 64)
SMS = 132
WARM_SECONDS, RUN_SECONDS = 0.1, 0.12  # of each timing
ORDER = ("gate_up", "down", "qkv", "o")  # the longest first
SWEEPS = 2
TILES = (32, 48, 64, 112, 128)  # rows of W

Choices = dict[str, GemmConfig]  # of each product of a layer


def candidates(rows: int, evict: str) -> list[GemmConfig]:
    """Everything worth a try. Partitions have pairs of SMs, so a cluster is a pair at most; of a pair that splits K, a
    CTA's share of the sums fits into a stage."""
    pairs = ((1, 1), (1, 2), (2, 1))  # tiles that share rows of x, CTAs that share K
    found = [GemmConfig(tile, rows, m, split=split, evict=evict, swap=True) for tile in TILES for m, split in pairs]
    return [c for c in found if c.split == 1 or c.warpgroups * c.tile_n <= max(c.tile_m, c.tile_n)]


class Layer:
    """The products of a layer with weights of their own, together larger than L2, for so many rows."""

    def __init__(self, kernels: GemmKernels, model: str, weights: dict[str, Any], rows: int) -> None:
        import cupy

        self.shapes, self.weights, self.rows, self._kernels = MODELS[model], weights, rows, kernels
        self.x = {name: normal(rows, k) for name, (_, k) in self.shapes.items()}
        self.y = {name: cupy.empty((rows, n), cupy.uint16) for name, (n, _) in self.shapes.items()}
        self.count = cupy.array([rows], cupy.int32)

    def seconds(self, choices: Choices) -> float:
        return self._measured([self._product(name, choices[name]) for name in self.shapes])

    def cublas(self) -> float:
        return self._measured([cublas.gemm(self.x[name], self.weights[name], self.y[name]) for name in self.shapes])

    @functools.cache  # noqa: B019 — both live as long as the process
    def _product(self, name: str, config: GemmConfig) -> Call:
        gemm = self._kernels.product(*self.shapes[name], self.rows, sms=SMS, choice=GemmChoice(config))
        x, w, y = (array[name].data.ptr for array in (self.x, self.weights, self.y))
        return lambda stream: gemm.launch(x=x, w=w, y=y, rows=self.count.data.ptr, stream=stream)

    @staticmethod
    def _measured(calls: list[Call]) -> float:
        def layer(stream: int) -> None:
            for call in calls:
                call(stream)

        return measure([layer], warm=WARM_SECONDS, run=RUN_SECONDS).seconds


def descend(layer: Layer, model: str, configs: list[GemmConfig]) -> list[dict[str, Any]]:
    """A point per product: the layer's seconds with each candidate for it, the others at the best known then."""
    reference = layer.cublas()
    starts = [{name: choose(n, k, layer.rows, SMS).config for name, (n, k) in layer.shapes.items()}]
    starts += [dict.fromkeys(layer.shapes, config) for config in configs]
    choices = min(starts, key=layer.seconds)
    points = {}
    for name in ORDER * SWEEPS:
        others = [config for config in configs if config != choices[name]]
        times = {config: layer.seconds({**choices, name: config}) for config in [choices[name], *others]}
        choices[name] = min(times, key=lambda config: times[config])
        n, k = layer.shapes[name]
        points[name] = {
            "model": model, "name": name, "n": n, "k": k, "sms": SMS, "rows": layer.rows, "cublas": None,
            "layer_cublas": reference, "times": [[choices[name].label, 8, times[choices[name]]]],
            "tried": {config.label: seconds for config, seconds in times.items()},
        }  # fmt: skip
    best = layer.seconds(choices)
    labels = " ".join(f"{name} {config.label}" for name, config in choices.items())
    print(f"{model}, {layer.rows} rows: {best * 1e6:.1f} µs, cuBLAS {reference * 1e6:.1f} µs; {labels}", flush=True)
    return list(points.values())


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("command", choices=("compile", "measure"))
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument(
        "--evict", choices=EVICTIONS, default="", metavar="XW", help="what candidates tell L2: nf, lf, fl"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "measure" and args.out is None:
        parser.error("--out: measure needs a file for its record")
    configs = {*configurations(), *(config for rows in args.rows for config in candidates(rows, args.evict))}
    sources = [config.source("none") for config in sorted(configs) if config.swap]
    if args.command == "compile":
        compile_kernels(sources, "sm_90a", folder=args.bundle)
        return
    try:
        record = new_record(note="seconds of a whole layer")
        kernels = GemmKernels(KernelLoader(load_bundle(sources, "sm_90a", args.bundle)))
    except NfError as error:
        parser.exit(1, f"tune_gemm_layer: {error}\n")
    for model in args.models:
        weights = {name: normal(n, k) for name, (n, k) in MODELS[model].items()}
        for rows in args.rows:
            record["points"] += descend(Layer(kernels, model, weights, rows), model, candidates(rows, args.evict))
            args.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
