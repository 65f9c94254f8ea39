"""SM partitions: disjoint groups of a GPU's SMs, each with streams whose kernels run nowhere else.

A partition is a green context of the CUDA driver. Kernels captured on its streams keep to its SMs in every replay of
the graph, whichever stream that is launched on.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nf.errors import InputError
from nf.graphs.pipeline_plan import PAIR, Stream
from nf.kernels import device as cuda
from nf.kernels.device import CudaError, checked

logger = logging.getLogger(__name__)

Sms = int | Literal["all"]
# CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING: pairs, whose unions need not have room for clusters of more than two
# CTAs. No kernel here has any.
BY_PAIRS = 1
ARRANGEMENT = "pairs at even distances"  # which SMs a partition has: what was measured on others is not valid here


class PartitionError(CudaError):
    """The driver gives no SM partitions."""


@dataclass(frozen=True, slots=True)
class SmPartition:
    """``sms`` SMs of a GPU. Lives as long as the process: making one takes time, so it is made once and shared."""

    sms: int
    context: Any  # CUgreenCtx

    def stream(self, priority: int = 0) -> int:
        """A new stream on these SMs, as an integer; a lower number is a higher priority."""
        from cuda.bindings import driver

        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(checked(driver.cuGreenCtxStreamCreate(self.context, flags, priority)))


@dataclass(frozen=True, slots=True)
class Lane:
    """A stream of a plan on the GPU: where its kernels are launched, and on how many SMs they may run."""

    name: str
    stream: int
    sms: int


def lanes(streams: Sequence[Stream], total_sms: int, device: int = 0) -> tuple[Lane, ...]:
    """A lane for each stream of a plan: of a partition where it has a number of SMs, of the whole GPU otherwise.

    Lanes are made once for plans that ask for the same and live as long as the process; nothing runs on them but what
    is captured. Without green contexts (an old driver) a lane's kernels are launched with as many CTAs as its SMs hold,
    and run wherever there is room; the log says so once.

    Raises:
        InputError: the hardware cannot give a number of SMs; the message names the nearest that it can.
    """
    return _lanes(tuple((stream.name, stream.sms, stream.priority) for stream in streams), total_sms, device)


@functools.cache
def _lanes(streams: tuple[tuple[str, Sms, int], ...], total_sms: int, device: int) -> tuple[Lane, ...]:
    own = iter(available_partitions((sms for _, sms, _ in streams), device))
    found = []
    for name, sms, priority in streams:
        partition = None if sms == "all" else next(own, None)
        handle = partition.stream(priority) if partition else cuda.Stream(priority).handle
        found.append(Lane(name, handle, total_sms if sms == "all" else sms))
    return tuple(found)


def available_partitions(sms: Iterable[Sms], device: int = 0) -> tuple[SmPartition, ...]:
    """A partition for each number of SMs, in order; none at all where the driver has no green contexts.

    Raises:
        InputError: the hardware cannot give one of them; the message names the nearest that it can.
    """
    try:
        return required_partitions(sms, device)
    except PartitionError as error:
        _say_without(str(error))
        return ()


def required_partitions(sms: Iterable[Sms], device: int = 0) -> tuple[SmPartition, ...]:
    """``available_partitions`` for who measures them: figures of the whole GPU would pass for theirs.

    Raises:
        InputError: the hardware cannot give one of them; the message names the nearest that it can.
        PartitionError: the driver has no green contexts.
    """
    try:
        return partitions(tuple(count for count in sms if count != "all"), device)
    except (CudaError, AttributeError) as error:
        raise PartitionError(f"SM partitions are not available ({error})") from error


@functools.cache
def _say_without(reason: str) -> None:
    logger.warning("%s: SM counts of a plan limit its grids alone", reason)


@functools.cache
def partitions(counts: tuple[int, ...], device: int = 0) -> tuple[SmPartition, ...]:
    """Disjoint partitions of exactly these numbers of SMs, each with SMs from all over the GPU.

    SMs of a GPC share a way to memory, and what the driver gives in one piece lies in as few GPCs as possible: 20 SMs
    of an H200 read 2.6 TB/s then, 3.9 where they are spread (docs/benchmarks/2026-11-29-h200-spread.md).

    Raises:
        InputError: the hardware cannot give one of them; the message names the nearest that it can.
        CudaError: the driver refused.
    """
    if not counts:
        return ()
    from cuda.bindings import driver

    checked(driver.cuInit(0))
    handle = checked(driver.cuDeviceGet(device))
    left, taken = sm_pairs(handle), dict[int, list[Any]]()
    # The smallest first: they are for what reads memory, and so have to be spread over all of the GPU.
    for index in sorted(range(len(counts)), key=counts.__getitem__):
        taken[index] = _take(left, counts[index])
    return tuple(partition_of(taken[index], handle) for index in range(len(counts)))


def sm_pairs(device: Any) -> list[Any]:
    """All SMs of the GPU (CUdevResource), two by two where it gives so few, in the driver's order: it goes around the
    GPCs, so neighbours in the list are not neighbours on the chip."""
    from cuda.bindings import driver

    whole = checked(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    most = whole.sm.smCount // PAIR
    pairs, count, rest = checked(driver.cuDevSmResourceSplitByCount(most, whole, BY_PAIRS, PAIR))
    return [*pairs[:count], *([rest] if rest.sm.smCount else [])]


def _take(pairs: list[Any], sms: int) -> list[Any]:
    """Take from ``pairs`` so many that they have ``sms`` SMs together, evenly over the list. The last, which may be a
    single SM, is left to who takes all.
    """
    total = sum(pair.sm.smCount for pair in pairs)
    if not 0 < sms <= total:
        raise InputError("sms", f"a partition of {sms} SMs cannot be split off the {total} that are left")
    if sms == total:
        taken, pairs[:] = list(pairs), []
        return taken
    step = pairs[0].sm.smCount
    if sms % step:
        nearest = step * max(1, round(sms / step))
        raise InputError("sms", f"this GPU cannot give a partition of {sms} SMs; the nearest it can is {nearest}")
    count = sms // step
    places = [index * len(pairs) // count for index in range(count)]
    taken = [pairs[place] for place in places]
    for place in reversed(places):
        del pairs[place]
    return taken


def partition_of(pairs: Sequence[Any], device: Any) -> SmPartition:
    """What several of ``sm_pairs`` make together."""
    from cuda.bindings import driver

    description = checked(driver.cuDevResourceGenerateDesc(list(pairs), len(pairs)))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    sms = sum(pair.sm.smCount for pair in pairs)
    return SmPartition(sms, checked(driver.cuGreenCtxCreate(description, device, flags)))
