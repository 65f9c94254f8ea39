"""SM partitions: disjoint groups of a GPU's SMs, each with streams whose kernels run nowhere else.

A partition is a green context of the CUDA driver. Kernels captured on its streams keep to its SMs in every replay of
the graph, whichever stream that is launched on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nf.errors import InputError, NfError


class PartitionError(NfError, RuntimeError):
    """The driver refused to make a partition."""


@dataclass(frozen=True, slots=True)
class SmPartition:
    """``sms`` SMs of a GPU. Lives as long as the process: making one takes time, so make it once and share it."""

    sms: int
    context: Any  # CUgreenCtx

    def stream(self, priority: int = 0) -> int:
        """A new stream on these SMs, as an integer; a lower number is a higher priority."""
        from cuda.bindings import driver

        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(_checked(driver.cuGreenCtxStreamCreate(self.context, flags, priority)))


def split(sms: int, device: int = 0) -> tuple[SmPartition, SmPartition]:
    """Two disjoint partitions: the first with ``sms`` SMs, the second with the rest.

    Raises:
        InputError: the hardware cannot give that number; the message names the nearest that it can.
        PartitionError: the driver refused.
    """
    from cuda.bindings import driver

    _checked(driver.cuInit(0))
    handle = _checked(driver.cuDeviceGet(device))
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    everything = _checked(driver.cuDeviceGetDevResource(handle, kind))
    total = everything.sm.smCount
    if not 0 < sms < total:
        raise InputError("sms", f"{sms} of the {total} SMs of this GPU leave nothing to split")
    groups, _, rest = _checked(driver.cuDevSmResourceSplitByCount(1, everything, 0, sms))
    (group,) = groups
    if group.sm.smCount == sms:
        return _partition(group, handle), _partition(rest, handle)
    # The driver rounds a group up; the remainder may still have the very size that was asked for.
    groups, _, rest = _checked(driver.cuDevSmResourceSplitByCount(1, everything, 0, total - sms))
    if rest.sm.smCount == sms:
        return _partition(rest, handle), _partition(groups[0], handle)
    nearest = sorted({group.sm.smCount, rest.sm.smCount}, key=lambda count: abs(count - sms))
    raise InputError("sms", f"this GPU cannot give a partition of {sms} SMs; the nearest it can is {nearest[0]}")


def _partition(resource: Any, device: Any) -> SmPartition:
    from cuda.bindings import driver

    description = _checked(driver.cuDevResourceGenerateDesc([resource], 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    return SmPartition(resource.sm.smCount, _checked(driver.cuGreenCtxCreate(description, device, flags)))


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise PartitionError(f"the CUDA driver answered {status.name}")
    return values[0] if len(values) == 1 else values
