"""Choose GEMM configurations for few rows by the time of a whole layer.

With so few rows a product lasts some 10 µs, and what it costs depends on how the next one's first reads overlap with
its end.

    python scripts/tune_gemm_layer.py compile --bundle DIR                   # anywhere
    python scripts/tune_gemm_layer.py measure --bundle DIR --out a.json      # on the GPU, needs cupy

Starts from what the table has or one configuration for all products, whatever is faster, then tries the others for one
product after the other, twice, and keeps what is faster. Layers do not repeat well in so short a time, so the fastest
of all that were met are measured again, at steady state and in turn, and of these the best counts. The record goes to
``tune_gemm.py reduce``; its seconds are those of the layer, and it leaves no choice: the best of each product is so
beside the best of the others. With ``--evict``, given to both, candidates tell the L2 cache what to drop, e.g. W, so
that it keeps x (``nf``).
"""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Any

from tune_gemm import new_record

from nf.bench import cublas
from nf.bench.gemm_cases import MODELS
from nf.bench.kernels import normal
from nf.bench.measure import Call, measure
from nf.cli.files import check_writable
from nf.cli.parser import CommandParser
from nf.errors import NfError
from nf.kernels.compile import compile_kernels, load_bundle
from nf.kernels.gemm import EVICTIONS, GemmChoice, GemmConfig, GemmKernels, choose, configurations
from nf.kernels.load import KernelLoader

ROWS = (16, 32, 64)
SMS = 132
WARM_SECONDS, RUN_SECONDS = 0.1, 0.12  # of each timing but those of the finalists
FINALISTS, TURNS = 8, 3
ORDER = ("gate_up", "down", "qkv", "o")  # the longest first
SWEEPS = 2
TILES = (32, 48, 64, 112, 128)  # rows of W

Choices = dict[str, GemmConfig]  # of each product of a layer


def candidates(rows: int, evict: str) -> list[GemmConfig]:
    """Everything worth a try: alone or in pairs that split K, of which a CTA's share of the sums fits into a stage.
    Partitions have pairs of SMs, and pairs that share x instead were the best for no product."""
    found = [GemmConfig(tile, rows, split=split, evict=evict, swap=True) for tile in TILES for split in (1, 2)]
    return [c for c in found if c.split == 1 or c.warpgroups * c.tile_n <= max(c.tile_m, c.tile_n)]


class Layer:
    """The products of a layer with weights of their own, together larger than L2, for so many rows."""

    def __init__(self, kernels: GemmKernels, model: str, weights: dict[str, Any], rows: int) -> None:
        import cupy

        self.shapes, self.weights, self.rows, self._kernels = MODELS[model], weights, rows, kernels
        self.x = {name: normal(rows, k) for name, (_, k) in self.shapes.items()}
        self.y = {name: cupy.empty((rows, n), cupy.uint16) for name, (n, _) in self.shapes.items()}
        self.count = cupy.array([rows], cupy.int32)

    def seconds(self, choices: Choices, *, steady: bool = False) -> float:
        return self._measured([self._product(name, choices[name]) for name in self.shapes], steady)

    def cublas(self) -> float:
        calls = [cublas.gemm(self.x[name], self.weights[name], self.y[name]) for name in self.shapes]
        return self._measured(calls, steady=True)

    @functools.cache  # noqa: B019 — both live as long as the process
    def _product(self, name: str, config: GemmConfig) -> Call:
        gemm = self._kernels.product(*self.shapes[name], self.rows, sms=SMS, choice=GemmChoice(config))
        x, w, y = (array[name].data.ptr for array in (self.x, self.weights, self.y))
        return lambda stream: gemm.launch(x=x, w=w, y=y, rows=self.count.data.ptr, stream=stream)

    @staticmethod
    def _measured(calls: list[Call], steady: bool) -> float:
        def layer(stream: int) -> None:
            for call in calls:
                call(stream)

        measured = measure([layer]) if steady else measure([layer], warm=WARM_SECONDS, run=RUN_SECONDS)
        return measured.seconds


def descend(layer: Layer, model: str, configs: list[GemmConfig]) -> list[dict[str, Any]]:
    """A point per product: its configuration in the best layer, that layer's seconds, and what the layer took with each
    candidate for it when it was last tried, the others at the best known then."""
    reference = layer.cublas()
    met: dict[tuple[GemmConfig, ...], float] = {}

    def seconds(choices: Choices) -> float:
        met[tuple(choices[name] for name in layer.shapes)] = found = layer.seconds(choices)
        return found

    starts = [{name: choose(n, k, layer.rows, SMS).config for name, (n, k) in layer.shapes.items()}]
    starts += [dict.fromkeys(layer.shapes, config) for config in configs]
    choices, tried = min(starts, key=seconds), {}
    for name in ORDER * SWEEPS:
        others = [config for config in configs if config != choices[name]]
        tried[name] = {config: seconds({**choices, name: config}) for config in [choices[name], *others]}
        choices[name] = min(tried[name], key=lambda config, of=tried[name]: of[config])
    finalists = [
        dict(zip(layer.shapes, each, strict=True)) for each in sorted(met, key=lambda each: met[each])[:FINALISTS]
    ]
    turns = [[layer.seconds(each, steady=True) for each in finalists] for _ in range(TURNS)]
    means = [statistics.fmean(each) for each in zip(*turns, strict=True)]
    best = min(means)
    choices = finalists[means.index(best)]
    labels = " ".join(f"{name} {config.label}" for name, config in choices.items())
    of_best = " ".join(f"{turn[means.index(best)] * 1e6:.1f}" for turn in turns)
    print(f"{model}, {layer.rows} rows: {of_best} µs, cuBLAS {reference * 1e6:.1f} µs; {labels}", flush=True)
    return [
        {
            "model": model, "name": name, "n": n, "k": k, "sms": SMS, "rows": layer.rows, "cublas": None,
            "layer_cublas": reference, "times": [[choices[name].label, 8, best]],
            "tried": {config.label: took for config, took in tried[name].items()},
        }
        for name, (n, k) in layer.shapes.items()
    ]  # fmt: skip


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("command", choices=("compile", "measure"))
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, choices=range(16, 65, 16), default=ROWS, help="16, 32, 48, 64")
    parser.add_argument(
        "--evict", choices=EVICTIONS, default="", metavar="XW", help="what candidates tell L2: nf, lf, fl"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "measure" and args.out is None:
        parser.error("--out: measure needs a file for its record")
    configs = {*configurations(), *(config for rows in args.rows for config in candidates(rows, args.evict))}
    sources = [config.source("none") for config in sorted(configs) if config.swap]
    try:
        if args.command == "compile":
            compile_kernels(sources, "sm_90a", folder=args.bundle)
            return
        check_writable("--out", args.out)
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
