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
from nf.graphs.pipeline_plan import Stream
from nf.kernels import device as cuda
from nf.kernels.device import CudaError, checked

logger = logging.getLogger(__name__)

Sms = int | Literal["all"]
# CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING: sizes in which not every SM may find partners for a cluster of more
# than two CTAs, of which no kernel here has any. Taken where the driver gives a size in no other way.
FINER = 1


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
    """Disjoint partitions of exactly these numbers of SMs.

    Raises:
        InputError: the hardware cannot give one of them; the message names the nearest that it can.
        CudaError: the driver refused.
    """
    if not counts:
        return ()
    from cuda.bindings import driver

    checked(driver.cuInit(0))
    handle = checked(driver.cuDeviceGet(device))
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    left = checked(driver.cuDeviceGetDevResource(handle, kind))
    groups = []
    for index, sms in enumerate(counts):
        rest = counts[index + 1 :]
        if rest or left.sm.smCount != sms:
            group, left = _split(left, sms)
            groups.append(group)
        else:
            groups.append(left)
    return tuple(_partition(group, handle) for group in groups)


def _split(resource: Any, sms: int) -> tuple[Any, Any]:
    """A group of ``sms`` SMs and the rest."""
    from cuda.bindings import driver

    total = resource.sm.smCount
    if not 0 < sms < total:
        raise InputError("sms", f"a partition of {sms} SMs cannot be split off the {total} that are left")
    sizes = []
    for flags in (0, FINER):
        groups, _, rest = checked(driver.cuDevSmResourceSplitByCount(1, resource, flags, sms))
        (group,) = groups
        if group.sm.smCount == sms:
            return group, rest
        # The driver rounds a group up; the remainder may still have the very size that was asked for.
        groups, _, other = checked(driver.cuDevSmResourceSplitByCount(1, resource, flags, total - sms))
        if other.sm.smCount == sms:
            return other, groups[0]
        sizes += [group.sm.smCount, other.sm.smCount]
    nearest = min(sizes, key=lambda count: abs(count - sms))
    raise InputError("sms", f"this GPU cannot give a partition of {sms} SMs; the nearest it can is {nearest}")


def _partition(resource: Any, device: Any) -> SmPartition:
    from cuda.bindings import driver

    description = checked(driver.cuDevResourceGenerateDesc([resource], 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    return SmPartition(resource.sm.smCount, checked(driver.cuGreenCtxCreate(description, device, flags)))
