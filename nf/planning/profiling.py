"""Filling a profile: which nano-operations are measured, on how many rows and SMs, and what runs beside what.

How a point is measured is the bench's business (gpu_bench.py). What has been measured is kept as it comes in, so an
interrupted run goes on where it stopped; a point that cannot be measured is told and left out, a GPU on which nothing
can be measured any more ends the run. The whole GPU comes first, then one partition after the other: what an
interrupted run has suffices for the plans on these.

Left out, because a plan of this engine cannot use it or another point stands for it: SM counts that are neither a
partition for memory-bound operations nor what such a one leaves; norms, rotations and routers, which take little, on
more than a few rows and SM counts; attention at more than two contexts; pairs with anything but a GEMM on the
compute-bound side.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from nf.errors import InputError, NfError
from nf.graphs.builtin import lane_of
from nf.models.operations import Operation, Resource, Rows
from nf.planning.profile import ROW_STEP, SM_STEP, CoRun, Cost, PairKey, Profile, Sms, Solo, SoloKey

logger = logging.getLogger(__name__)

QUICK_SECONDS, FULL_SECONDS = 150.0, 690.0  # of measuring, at most; starting and loading come on top
SAVE_SECONDS = 1.0
ENDS = "ends"
"""Stands for what comes before and after the layers, most of it logits and sampling; its rows are the tokens that are
sampled."""

Point = SoloKey | PairKey


class Bench(Protocol):
    """Measures at steady state, in CUDA graphs, on one model's weights and KV pages."""

    @property
    def broken(self) -> bool:
        """Whether nothing can be measured any more, as after an illegal address: asked after a point that failed."""
        ...

    def solo(self, key: SoloKey) -> Cost:
        """Time and energy of one run of a nano-operation that has the GPU, or its partition, to itself."""
        ...

    def co_run(self, first: SoloKey, second: SoloKey) -> CoRun:
        """Two nano-operations beside each other, each repeated on its own stream."""
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a profile has its points.

    Args:
        rows: of GEMMs and prefill attention.
        light_rows: of operations that take little.
        decode_rows: of decode attention.
        decode_contexts, prefill_contexts: mean tokens of context per row.
        memory_sms: partitions for memory-bound lanes; compute-bound ones get what they leave.
        pair_rows: of the GEMM of a co-run.
        gpu_sms: SMs of the GPU.
    """

    rows: tuple[int, ...]
    light_rows: tuple[int, ...]
    decode_rows: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    prefill_contexts: tuple[int, ...]
    memory_sms: tuple[int, ...]
    pair_rows: tuple[int, ...]
    gpu_sms: int

    @property
    def compute_sms(self) -> tuple[int, ...]:
        return tuple(self.gpu_sms - sms for sms in self.memory_sms)


def quick_extent(dense_batch_size: int, gpu_sms: int) -> Extent:
    """Four batch sizes and six partitions: enough to rank plans, in less than three minutes."""
    rows = _fractions(dense_batch_size, (8, 4, 2, 1))
    return Extent(
        rows=rows,
        light_rows=_fractions(dense_batch_size, (4, 1)),
        decode_rows=_fractions(dense_batch_size, (8, 4, 2)),
        decode_contexts=(512, 2048),
        prefill_contexts=(512,),
        memory_sms=_multiples(SM_STEP, gpu_sms, (2, 3, 4, 5, 6, 8)),
        pair_rows=_fractions(dense_batch_size, (2,)),
        gpu_sms=gpu_sms,
    )


def full_extent(dense_batch_size: int, gpu_sms: int) -> Extent:
    """Batch sizes in steps of 128 (256 above 2048), partitions of 8, 12, … SMs: of an H200 24 read as fast as all."""
    steps = [r for r in range(ROW_STEP, dense_batch_size + 1, ROW_STEP) if r <= 2048 or r % (2 * ROW_STEP) == 0]
    rows = tuple(sorted({*steps, dense_batch_size}))
    return Extent(
        rows=rows,
        light_rows=_fractions(dense_batch_size, (16, 4, 2, 1)),
        decode_rows=tuple(r for r in rows if r <= 0.75 * dense_batch_size) or rows,
        decode_contexts=(512, 2048),
        prefill_contexts=(256, 1024),
        memory_sms=_multiples(SM_STEP, gpu_sms // 2, (2, 3, 4, 5, 6, 7, 8, 12)),
        pair_rows=_fractions(dense_batch_size, (2, 1)),
        gpu_sms=gpu_sms,
    )


def _fractions(whole: int, parts: Sequence[int]) -> tuple[int, ...]:
    """whole / part for each part, in whole steps of rows where that leaves any."""
    if whole < 1:
        raise InputError("dense_batch_size", f"must be at least 1 token, got {whole}")
    return tuple(sorted({max(min(ROW_STEP, whole), whole // part // ROW_STEP * ROW_STEP) for part in parts}))


def _multiples(step: int, below: int, factors: Sequence[int]) -> tuple[int, ...]:
    return tuple(step * factor for factor in factors if step * factor < below)


def wanted_solos(operations: Sequence[Operation], extent: Extent) -> list[SoloKey]:
    """Every (operation, rows, SMs, context) to be measured, operation by operation, so that clocks change seldom."""
    found = [key for operation in operations for key in _of_operation(operation, extent)]
    return found + [(ENDS, rows, "all", 0) for rows in extent.light_rows]


def _of_operation(operation: Operation, extent: Extent) -> Iterator[SoloKey]:
    rows, sms = extent.rows, extent.compute_sms
    contexts: tuple[int, ...] = (0,)
    if lane_of(operation) != "compute":
        rows, contexts, sms = extent.decode_rows, extent.decode_contexts, extent.memory_sms
    elif operation.rows is Rows.PREFILL:
        contexts, sms = extent.prefill_contexts, _ends(sms)
    elif is_light(operation):
        rows, sms = extent.light_rows, _ends(sms)
    places: tuple[Sms, ...] = ("all", *sms)
    for place in places:
        for context in contexts:
            yield from ((operation.name, count, place, context) for count in rows)


def wanted_pairs(operations: Sequence[Operation], extent: Extent) -> list[PairKey]:
    """Every GEMM beside every memory-bound lane's operation: without partition, then for each partition."""
    gemms = [o for o in operations if lane_of(o) == "compute" and o.rows is Rows.ALL and not is_light(o)]
    others = [o for o in operations if lane_of(o) != "compute"]
    # As many rows as the decode tokens of half a batch in a balanced load, and the shorter context.
    beside = extent.decode_rows[len(extent.decode_rows) // 2]
    context = extent.decode_contexts[0]
    places: list[tuple[Sms, Sms]] = [("all", "all"), *((extent.gpu_sms - sms, sms) for sms in extent.memory_sms)]
    return [
        ((gemm.name, rows, compute, 0), (other.name, beside, memory, context))
        for other in others
        for compute, memory in places
        for rows in extent.pair_rows
        for gemm in gemms
    ]


def wanted_points(operations: Sequence[Operation], extent: Extent) -> list[Point]:
    """All of them, place by place: what is measured on the whole GPU, then on each partition and what it leaves."""
    places: dict[Sms, int] = {"all": 0}
    for number, sms in enumerate(extent.memory_sms):
        places |= {sms: number + 1, extent.gpu_sms - sms: number + 1}

    def place(point: Point) -> int:
        return places[point[1][2] if len(point) == 2 else point[2]]

    return sorted([*wanted_solos(operations, extent), *wanted_pairs(operations, extent)], key=place)


def is_light(operation: Operation) -> bool:
    """Norms and rotations, bound by memory but short, and the router of experts, a product with few columns."""
    return operation.rows is Rows.ALL and (operation.resource is Resource.MEMORY or operation.name == "router")


def _ends(values: Sequence[int]) -> tuple[int, ...]:
    return (values[0], values[-1]) if len(values) > 1 else tuple(values)


@dataclass(frozen=True, slots=True)
class Missing:
    """What a profile lacks, in the order of measuring, and how many points it has of what was wanted."""

    points: tuple[Point, ...]
    known: int

    @property
    def count(self) -> int:
        return len(self.points)


def missing_points(profile: Profile, operations: Sequence[Operation], extent: Extent) -> Missing:
    """What is still to be measured."""
    wanted = wanted_points(operations, extent)
    left = profile.missing(wanted)
    return Missing(tuple(left), len(wanted) - len(left))


@dataclass(frozen=True, slots=True)
class Filled:
    """What a run did: points measured, points that were there before, points that it did not come to, and points that
    could not be measured."""

    measured: int
    known: int
    left: int
    failed: int = 0


def fill(
    profile: Profile,
    bench: Bench,
    operations: Sequence[Operation],
    extent: Extent,
    *,
    save: Callable[[Profile], object],
    seconds: float = math.inf,
    progress: Callable[[str], object] = lambda _: None,
) -> Filled:
    """Measure what is missing.

    Args:
        save: keeps the profile; called every second or so, and when the run ends, however it does.
        seconds: after which no further point is begun.
        progress: called with a few words after every point.

    Raises:
        NfError: the bench is broken, or no point could be measured and none was there before.
    """
    missing = missing_points(profile, operations, extent)
    deadline, saved, measured = monotonic() + seconds, monotonic(), 0
    failures: list[NfError] = []
    try:
        for point in missing.points:
            if monotonic() >= deadline:
                break
            try:
                _add(profile, _measure(bench, point))
            except NfError as error:
                if bench.broken:
                    raise
                logger.warning("%s was not measured: %s", words(point), error)
                failures.append(error)
            else:
                measured += 1
            progress(words(point))
            if measured and monotonic() - saved > SAVE_SECONDS:
                save(profile)
                saved = monotonic()
    finally:
        if measured:
            save(profile)
    if failures and not measured and not missing.known:
        raise failures[0]
    return Filled(measured, missing.known, missing.count - measured - len(failures), len(failures))


def _measure(bench: Bench, point: Point) -> Solo | CoRun:
    if len(point) == 2:
        return bench.co_run(*point)
    cost = bench.solo(point)
    return Solo(*point, cost.seconds, cost.joules)


def _add(profile: Profile, found: Solo | CoRun) -> None:
    """Take a point in.

    Raises:
        NfError: it is no measurement, of no time for one.
    """
    try:
        profile.add(found)
    except ValueError as error:
        raise NfError(str(error)) from error


def words(point: Point) -> str:
    """A point as a progress bar shows it."""
    if len(point) == 2:
        return " beside ".join(words(side) for side in point)
    operation, rows, sms, context = point
    return f"{operation} {rows} rows, {sms} SMs" + (f", context {context}" if context else "")
