"""Dense GEMM: y = epilogue(x·Wᵀ) with bf16 operands and fp32 accumulation, TMA and WGMMA, persistent CTAs.

Arrays, row-major, 16-byte aligned, on the device:
  x      [capacity, k] bf16
  w      [n, k] bf16
  y      [capacity, n] bf16 or fp32; for "swiglu" [capacity, n/2]
  extra  "bias" [n] bf16, "residual" [capacity, n] bf16 (it may be y itself); else not read
  rows   [1] int32: how many rows of x there are; a captured launch serves any number up to capacity

Epilogues: "none", "bias" and "residual" (added in fp32), "swiglu" (rows of W alternate 8 gate and 8 up rows; the output
is silu(gate)·up). Rows of y from ``rows`` to the next multiple of a cluster's tiles are undefined, those behind it
untouched; where x and W are swapped, all from ``rows`` on are.

``rows`` and W are read before the kernel launched before has ended: they must have been written before that one began.

For a mixture of experts, W is [experts, n, k], and rows of x are sorted by expert, each expert's from a multiple of 128
rows on (see moe.py).

What runs is a choice among a few compiled configurations: by measurement where kernels/gemm_table.json has the shape
(made by scripts/tune_gemm.py), else by a rule of thumb about what each would cost.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nf.errors import InputError
from nf.kernels.load import CuteKernel, KernelLoader
from nf.kernels.source import KernelSource, ParameterKind

Epilogue = Literal["none", "bias", "residual", "swiglu"]
Output = Literal["bfloat16", "float32"]

TABLE = Path(__file__).with_name("gemm_table.json")
TILE_K = 64
EVICTIONS = ("", "nf", "lf", "fl")
_SWAPPED = "swapped"
_PARAMETERS: tuple[ParameterKind, ...] = (*("pointer",) * 6, *("int32",) * 7)
_COMPILED: dict[Epilogue, str] = {"none": "none", "bias": "add", "residual": "add", "swiglu": "swiglu"}
_DSL_TYPES: dict[Output, str] = {"bfloat16": "BFloat16", "float32": "Float32"}


@dataclass(frozen=True, slots=True, order=True)
class GemmConfig:
    """Work of a CTA and a cluster.

    ``tile_m`` rows of x times ``tile_n`` rows of W; swapped, rows of W times rows of x, for few rows of x: then
    ``tile_m`` need only be a multiple of 16, so that there are as many tiles as places for CTAs. A cluster is cluster_m
    × cluster_n tiles that share their operands by multicast, times ``split`` CTAs that share a tile's K.

    ``evict`` tells the L2 cache how to treat x and W, a letter each: it drops "f" first, "l" last and "n" as it likes;
    empty: it is told nothing. A wave of tiles reads as much of both as the cache can hold; by a model of it
    (scripts/gemm_traffic.py) it would then have dropped what the next wave reads again.
    """

    tile_m: int
    tile_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    split: int = 1
    swap: bool = False
    evict: str = ""

    @property
    def label(self) -> str:
        """E.g. ``128x256_2x1x1``, ``64x16_1x1x2_swapped``, ``256x192_1x2x1_lf``."""
        cluster = f"{self.cluster_m}x{self.cluster_n}x{self.split}"
        options = [_SWAPPED] * self.swap + [self.evict] * bool(self.evict)
        return "_".join([f"{self.tile_m}x{self.tile_n}", cluster, *options])

    @classmethod
    def from_label(cls, label: str) -> GemmConfig:
        """Raises ValueError if it is none."""
        tile, cluster, *options = label.split("_")
        tile_m, tile_n = map(int, tile.split("x"))
        cluster_m, cluster_n, split = map(int, cluster.split("x"))
        swap = _SWAPPED in options
        (evict,) = options[swap:] or [""]
        config = cls(tile_m, tile_n, cluster_m, cluster_n, split, swap, evict)
        whole = 16 if swap else 64 * config.warpgroups  # rows of a tile
        if (
            config.label != label
            or evict not in EVICTIONS
            or min(tile_m, tile_n, config.cluster_size) < 1
            or tile_m % whole
        ):
            raise ValueError(label)
        return config

    @property
    def cluster_size(self) -> int:
        return self.cluster_m * self.cluster_n * self.split

    @property
    def warpgroups(self) -> int:
        """That multiply; each holds at most 192 accumulators per thread."""
        return 1 if self.tile_m <= 64 else 2

    @property
    def residents(self) -> int:
        """CTAs that are to share an SM; a few tiles fill it alone (see GemmUnits). Swapped ones only wait for memory:
        the next kernel's are to be there before the last leave."""
        return 2 if self.swap else 1

    def serves(self, epilogue: Epilogue, output: Output = "bfloat16") -> bool:
        """Whether this is compiled: a tile must divide into stores of at least 32 bytes per CTA. Products with a wide W
        (gate and up, the vocabulary) have tiles enough without splitting K."""
        wide = epilogue == "swiglu" or output == "float32"
        if self.swap or (self.split > 1 and wide):
            return self.swap
        return self.tile_n % (32 if epilogue == "swiglu" else 16 * self.split) == 0

    def tiles(self, n: int, rows: int) -> int:
        """Clusters' worth of work in a product with ``n`` columns."""
        m, n = (n, rows) if self.swap else (rows, n)
        return -(-m // (self.tile_m * self.cluster_m)) * -(-n // (self.tile_n * self.cluster_n))

    def clusters(self, sms: int) -> int:
        """Clusters that run at a time. A cluster lies within a GPC, so of those larger than 2 fewer fit (30 of 4 on
        the 132 SMs of an H200, as the driver tells)."""
        fit = sms * self.residents // self.cluster_size
        return max(1, fit if self.cluster_size <= 2 else fit * 10 // 11)

    def source(self, epilogue: Epilogue, output: Output = "bfloat16", *, grouped: bool = False) -> KernelSource:
        """The kernel to compile. ``grouped``: W is [experts, n, k]."""
        compiled = _COMPILED[epilogue]
        name = f"gemm_{self.label}_{compiled}_{output}{'_grouped' if grouped else ''}"
        config: dict[str, Any] = {
            "tile_m": self.tile_m,
            "tile_n": self.tile_n,
            "cluster_m": self.cluster_m,
            "cluster_n": self.cluster_n,
            "split": self.split,
            "warpgroups": self.warpgroups,
            "swap": self.swap,
            "residents": self.residents,
            "evict": self.evict,
            "epilogue": compiled,
            "out": _DSL_TYPES[output],
            "grouped": grouped,
        }
        return KernelSource(
            name=name,
            language="cute",
            files=("gemm_cute.py", "gemm_producer_cute.py", "gemm_consumer_cute.py", "gemm_units_cute.py"),
            parameters=_PARAMETERS,
            factory="nf.kernels.gemm_cute:build",
            config=tuple(config.items()),
        )


@dataclass(frozen=True, slots=True)
class GemmChoice:
    """A configuration and ``group``: how many columns of clusters are walked together, so that L2 serves what they
    share."""

    config: GemmConfig
    group: int = 8


GROUPED = (GemmConfig(128, 256, 1, 2), GemmConfig(128, 128, 1, 2))
"""For experts: tiles that share W by multicast could be of two of them, so clusters share x."""
GROUPED_EPILOGUES: tuple[Epilogue, ...] = ("none", "swiglu")


def sources() -> list[KernelSource]:
    """Every configuration of the table in every epilogue and output type it serves, and those for experts."""
    pairs: list[tuple[Epilogue, Output]] = [
        ("none", "bfloat16"), ("residual", "bfloat16"), ("swiglu", "bfloat16"), ("none", "float32"),
    ]  # fmt: skip
    dense = [
        config.source(epilogue, output)
        for config in configurations()
        for epilogue, output in pairs
        if config.serves(epilogue, output)
    ]
    grouped = [config.source(epilogue, grouped=True) for config in GROUPED for epilogue in GROUPED_EPILOGUES]
    return [*dense, *grouped]


@functools.cache
def configurations() -> tuple[GemmConfig, ...]:
    """What ships: every configuration the table names."""
    return tuple(sorted({choice.config for choice in _table().values()}))


@functools.cache
def _table() -> dict[tuple[int, int, int, int], GemmChoice]:
    """(n, k, sms, rows) → choice."""
    return {
        (entry["n"], entry["k"], entry["sms"], entry["rows"]): GemmChoice(
            GemmConfig.from_label(entry["config"]), entry["group"]
        )
        for entry in json.loads(TABLE.read_text())["entries"]
    }


def choose(n: int, k: int, rows: int, sms: int, epilogue: Epilogue = "none", output: Output = "bfloat16") -> GemmChoice:
    """What to run for up to ``rows`` rows on ``sms`` SMs.

    The table's choice where it has this shape on as many SMs with as many blocks of 128 rows (up to 128 rows: the next
    tabulated number); otherwise, and for an epilogue or output that this choice cannot serve, the cheapest by ``cost``.

    Raises:
        InputError: k is too small for any.
    """
    near = [r for (tn, tk, ts, r) in _table() if (tn, tk, ts) == (n, k, sms) and -(-r // 128) == -(-rows // 128)]
    exact = min((r for r in near if r >= rows), default=None) if rows <= 128 else max(near, default=None)
    if exact is not None:
        choice = _table()[n, k, sms, exact]
        if choice.config.serves(epilogue, output):
            return choice
    able = [config for config in configurations() if config.serves(epilogue, output) and config.split * TILE_K <= k]
    if not able:
        raise InputError("k", f"a GEMM needs k ≥ {TILE_K}, not {k}")
    return GemmChoice(min(able, key=lambda config: cost(config, n, k, rows, sms)))


def prefer(n: int, k: int, rows: int, sms: int, choice: GemmChoice) -> None:
    """Let ``choose`` take this from now on, as if the table said so; for tuning."""
    tabulated = rows if rows <= 128 else -(-rows // 128) * 128  # what ``choose`` prefers of a block
    _table()[n, k, sms, tabulated] = choice


def cost(config: GemmConfig, n: int, k: int, rows: int, sms: int) -> float:
    """What a configuration would cost, in clock cycles and up to what they all share; only the order means anything.

    A K tile takes the tensor cores tile_m · tile_n / 32 cycles, and L2 delivers about 128 bytes a cycle to an SM,
    operands shared in a cluster once. What L2 and shared memory deliver also takes power, and so clock, from the rest;
    every 64 rows of the left operand read all of the right one. A tile has some 2000 cycles besides, and 400 for the
    exchange if K is split. The time lies between whole rounds of tiles, as if the last took as long as the others, and
    the tiles' share of the SMs, as if nothing was lost: at the power limit idle SMs let the others run faster. The
    constants are fitted to what scripts/tune_gemm.py measured: at the card's steady state, choosing by them costs
    0.7 % on average and 5 % at most.
    """
    blocks = -(-config.tile_m // 64)
    multiply = blocks * 64 * config.tile_n / 32
    from_l2 = config.tile_m / config.cluster_n + config.tile_n / config.cluster_m
    from_shared = blocks * (64 + config.tile_n)
    k_tiles = -(-k // TILE_K) / config.split
    per_tile = k_tiles * (max(multiply, from_l2) + from_l2 / 10 + from_shared / 50) * config.residents
    per_tile += 2000 + (400 if config.split > 1 else 0)
    rounds = config.tiles(n, rows) / config.clusters(sms)
    return (math.ceil(rounds) + 1.5 * rounds) * per_tile


class GemmKernels:
    """Compiled kernels, each loaded when a product first needs it.

    Args:
        loader: of ``sources()``, at least those of the choices.
    """

    def __init__(self, loader: KernelLoader) -> None:
        self._loader = loader
        self._loaded: dict[str, CuteKernel] = {}

    def product(
        self,
        n: int,
        k: int,
        capacity: int,
        *,
        sms: int,
        epilogue: Epilogue = "none",
        output: Output = "bfloat16",
        num_experts: int | None = None,
        choice: GemmChoice | None = None,
    ) -> Gemm:
        """Launches of one product.

        Args:
            n, k: rows and columns of W.
            capacity: rows of x and y.
            sms: SMs of the partition, or of the GPU, that the launches run on.
            epilogue, output: see the module.
            num_experts: W is [num_experts, n, k], and every 128 rows of x belong to one expert; the epilogue is "none"
                or "swiglu", the output bf16.
            choice: None takes ``choose``'s.

        Raises:
            InputError: n or k is not a multiple of 16 or 8, a number is not positive, or nothing is compiled for this
                epilogue with this output, with experts or with this choice.
        """
        if n <= 0 or n % 16 or k < TILE_K or k % 8:
            raise InputError("n, k", f"a GEMM needs n a multiple of 16 and k of 8, k ≥ {TILE_K}, not {n} and {k}")
        for name, number in (
            ("capacity", capacity),
            ("sms", sms),
            ("num_experts", num_experts),
        ):
            if number is not None and number < 1:
                raise InputError(name, f"must be at least 1, not {number}")
        if epilogue not in _COMPILED or output not in _DSL_TYPES:
            raise InputError("epilogue, output", f"there is no {epilogue!r} with {output!r}")
        grouped = num_experts is not None
        if output == "float32" and epilogue != "none":
            raise InputError("output", f"float32 is there for the plain product only, not for {epilogue!r}")
        if grouped and (output == "float32" or epilogue not in GROUPED_EPILOGUES):
            raise InputError("epilogue", f"experts have bf16 outputs and {' or '.join(GROUPED_EPILOGUES)} only")
        if choice is None and grouped:
            choice = GemmChoice(min(GROUPED, key=lambda config: cost(config, n, k, capacity, sms)))
        choice = choice or choose(n, k, capacity, sms, epilogue, output)
        config = choice.config
        if choice.group < 1 or config.split * TILE_K > k or not (grouped or config.serves(epilogue, output)):
            raise InputError(
                "choice", f"{config.label} in groups of {choice.group} cannot serve {epilogue!r} at k = {k}"
            )
        if config.swap and capacity * n >= 1 << 31:
            raise InputError("capacity", f"{config.label} has y of less than 2³¹ elements, not {capacity} rows of {n}")
        name = choice.config.source(epilogue, output, grouped=grouped).name
        if name not in self._loaded:
            self._loaded[name] = self._loader.cute(name)
        return Gemm(self._loaded[name], choice, n, k, capacity, sms, epilogue, num_experts)


class Gemm:
    """One product, made by ``GemmKernels.product``."""

    def __init__(
        self,
        kernel: CuteKernel,
        choice: GemmChoice,
        n: int,
        k: int,
        capacity: int,
        sms: int,
        epilogue: Epilogue,
        num_experts: int | None,
    ) -> None:
        self.choice = choice
        self._takes_extra, self._takes_experts = epilogue in ("bias", "residual"), num_experts is not None
        self.n, self.k, self.capacity = n, k, capacity
        self._kernel = kernel
        extra_stride = n if epilogue == "residual" else 0
        self._sizes = (capacity, n, k, num_experts or 1, extra_stride, choice.group)
        self._clusters = self._clusters_on(sms)

    def launch(
        self,
        *,
        x: int,
        w: int,
        y: int,
        rows: int,
        extra: int = 0,
        tile_experts: int = 0,
        sms: int | None = None,
        stream: int,
    ) -> None:
        """Launch on ``stream``; arrays as integers.

        Args:
            tile_experts: [capacity / 128] int32, the expert of every 128 rows; these and ``rows`` may come from the
                kernel launched before. Only with experts.
            sms: fewer or more SMs than it was made for.

        Raises:
            InputError: ``extra`` or ``tile_experts`` is missing.
            LaunchError: the driver refused.
        """
        if self._takes_extra and not extra:
            raise InputError("extra", "must be given")
        if self._takes_experts and not tile_experts:
            raise InputError("tile_experts", "must be given")
        clusters = self._clusters if sms is None else self._clusters_on(sms)
        self._kernel.launch(x, w, y, extra or x, rows, tile_experts or rows, *self._sizes, clusters, stream=stream)

    def _clusters_on(self, sms: int) -> int:
        config = self.choice.config
        return min(config.clusters(sms), config.tiles(self.n, self.capacity))
