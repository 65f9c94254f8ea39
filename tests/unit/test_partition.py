"""SM partitions and lanes, on a double of a driver that gives SMs in pairs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nf.errors import InputError
from nf.graphs import partition
from nf.graphs.partition import PartitionError, available_partitions, lanes, partitions, required_partitions
from nf.graphs.pipeline_plan import Stream

TOTAL = 132


class Sms:
    """CUdevResource: a set of SMs."""

    def __init__(self, sms: range | list[int]) -> None:
        self.members = list(sms)
        self.sm = SimpleNamespace(smCount=len(self.members))


class Driver:
    """Green contexts as cuda.h has them; a context is the SMs it was made of."""

    def __init__(self) -> None:
        self.refuses = 0
        self.total = TOTAL
        self.streams: list[tuple[list[int] | None, int]] = []  # SMs, None for all of them, and priority
        self.CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
        self.CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
        self.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def cuInit(self, _flags: int) -> Any:  # noqa: N802
        return (status(self.refuses),)

    def cuDeviceGet(self, ordinal: int) -> Any:  # noqa: N802
        return status(0), ordinal

    def cuDeviceGetDevResource(self, _device: int, _kind: int) -> Any:  # noqa: N802
        return status(0), Sms(range(self.total))

    def cuDevSmResourceSplitByCount(self, count: int, resource: Sms, flags: int, least: int) -> Any:  # noqa: N802
        assert (flags, least) == (partition.BY_PAIRS, partition.PAIR)
        groups = [Sms(resource.members[2 * i : 2 * i + 2]) for i in range(count)]
        return status(0), groups, count, Sms(resource.members[2 * count :])

    def cuDevResourceGenerateDesc(self, resources: list[Sms], count: int) -> Any:  # noqa: N802
        assert count == len(resources)
        return status(0), Sms([sm for resource in resources for sm in resource.members])

    def cuGreenCtxCreate(self, resource: Sms, _device: int, _flags: int) -> Any:  # noqa: N802
        return status(0), resource

    def cuGreenCtxStreamCreate(self, context: Sms, _flags: int, priority: int) -> Any:  # noqa: N802
        return self._stream(context.members, priority)

    def cuStreamCreateWithPriority(self, _flags: int, priority: int) -> Any:  # noqa: N802
        return self._stream(None, priority)

    def _stream(self, sms: list[int] | None, priority: int) -> Any:
        self.streams.append((sms, priority))
        return status(0), len(self.streams)


class status(int):  # noqa: N801 stands for CUresult
    name = "CUDA_ERROR_NOT_SUPPORTED"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    double = Driver()
    bindings = ModuleType("cuda.bindings")
    bindings.driver = double  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    caches = (partition.partitions, partition._lanes, partition._say_without)
    for cache in caches:
        cache.cache_clear()
    yield double
    for cache in caches:
        cache.cache_clear()


def stream(name: str, sms: Any, priority: int = 0) -> Stream:
    return Stream(name, (), sms=sms, priority=priority)


@pytest.mark.parametrize(
    "counts", [(104, 28), (28, 104), (48,), (132,), (40, 48, 44), (8, 16, 24, 84), (112, 20), (20, 112), (6, 126)]
)
@pytest.mark.usefixtures("driver")
def test_groups_are_disjoint_and_of_the_sizes_asked_for(counts: tuple[int, ...]) -> None:
    made = partitions(counts)
    assert tuple(group.sms for group in made) == counts
    members = [sm for group in made for sm in group.context.members]
    assert len(members) == len(set(members)) == sum(counts)
    assert partitions(counts) is made


@pytest.mark.parametrize("sms", [8, 20, 24, 32, 48])
@pytest.mark.usefixtures("driver")
def test_a_partition_is_spread_over_the_gpu_and_leaves_what_others_need(sms: int) -> None:
    small, rest = (group.context.members for group in partitions((sms, TOTAL - sms)))
    gaps = [b - a for a, b in pairwise(small[::2])]
    assert max(gaps) - min(gaps) <= 2
    assert TOTAL - small[-1] <= TOTAL / sms * 2 + 2  # to the end of the list
    assert max(gaps) <= TOTAL / sms * 2 + 2
    assert [sm for pair in zip(small[::2], small[1::2], strict=True) for sm in pair] == small
    assert all(b == a + 1 and a % 2 == 0 for a, b in zip(small[::2], small[1::2], strict=True))
    assert sorted(small + rest) == list(range(TOTAL))


def test_the_odd_sm_goes_to_who_takes_all_that_is_left(driver: Driver) -> None:
    driver.total = 115
    assert [group.sms for group in partitions((16, 99))] == [16, 99]
    assert sorted(sm for group in partitions((16, 99)) for sm in group.context.members) == list(range(115))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((101, 31), r"^sms: this GPU cannot give a partition of 31 SMs; the nearest it can is 3[02]$"),
        ((1, 100), r"^sms: this GPU cannot give a partition of 1 SMs; the nearest it can is 2$"),
        ((104, 17), r"^sms: this GPU cannot give a partition of 17 SMs; the nearest it can is 1[68]$"),
        ((132, 8), r"^sms: a partition of 132 SMs cannot be split off the 124 that are left$"),
        ((104, 40), r"^sms: a partition of 104 SMs cannot be split off the 92 that are left$"),
        ((0, 8), r"^sms: a partition of 0 SMs cannot be split off the 132 that are left$"),
    ],
)
@pytest.mark.usefixtures("driver")
def test_what_the_hardware_cannot_give_is_refused(counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        available_partitions(counts)


def test_a_lane_for_each_stream_is_made_once(driver: Driver) -> None:
    streams = [stream("memory", 32, -2), stream("all", "all", -1), stream("compute", 100)]
    found = lanes(streams, TOTAL)
    assert [(lane.name, lane.sms) for lane in found] == [("memory", 32), ("all", TOTAL), ("compute", 100)]
    memory, everything, compute = (driver.streams[lane.stream - 1] for lane in found)
    assert everything == (None, -1)
    assert (memory[1], compute[1]) == (-2, 0)
    assert memory[0] is not None
    assert compute[0] is not None
    assert sorted(memory[0] + compute[0]) == list(range(TOTAL))
    assert lanes(streams, TOTAL) is found
    assert len(driver.streams) == 3


def test_without_green_contexts_lanes_are_plain_streams_and_the_log_says_so_once(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.refuses = 801
    with caplog.at_level(logging.WARNING):
        assert available_partitions([100, 32]) == ()
        found = lanes([stream("compute", 100), stream("memory", 32)], TOTAL)
        lanes([stream("compute", 104), stream("memory", 28)], TOTAL)
    assert [lane.sms for lane in found] == [100, 32]
    assert [sms for sms, _ in driver.streams] == [None] * 4
    assert len(caplog.records) == 1
    assert "SM counts of a plan limit its grids alone" in caplog.text


def test_who_needs_partitions_is_refused_without_green_contexts(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.refuses = 801
    with pytest.raises(PartitionError, match=r"^SM partitions are not available \(.*CUDA_ERROR_NOT_SUPPORTED\)$"):
        required_partitions([100, "all", 32])
    assert not caplog.records
    assert required_partitions(["all"]) == ()
    driver.refuses = 0
    assert [partition.sms for partition in required_partitions([100, "all", 32])] == [100, 32]


def test_a_plan_without_partitions_asks_the_driver_for_none(driver: Driver) -> None:
    driver.refuses = 801
    assert available_partitions(["all", "all"]) == ()
