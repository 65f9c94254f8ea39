"""scripts/bench_partitions.py: which SMs its partitions have, on a double of the driver, and what it refuses."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_bench_scripts import load_script

GROUPS = 16


class Driver:
    """Groups of SMs are their numbers, and a context is the groups it was made of."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)

    cuDeviceGet = staticmethod(lambda ordinal: (0, ordinal))  # noqa: N815
    cuDeviceGetDevResource = staticmethod(lambda *_: (0, SimpleNamespace(sm=SimpleNamespace(smCount=132))))  # noqa: N815
    cuDevSmResourceSplitByCount = staticmethod(lambda count, *_: (0, list(range(count)), GROUPS, None))  # noqa: N815
    cuDevResourceGenerateDesc = staticmethod(lambda groups, count: (0, (groups, count)))  # noqa: N815
    cuGreenCtxCreate = staticmethod(lambda description, *_: (0, description))  # noqa: N815


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    bindings = ModuleType("cuda.bindings")
    bindings.driver = Driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    made = load_script("bench_partitions", monkeypatch)
    monkeypatch.setattr(made, "partitions", lambda counts: [SimpleNamespace(sms=counts[0], context=None)])
    monkeypatch.setattr(made, "checked", lambda answer: answer[1] if len(answer) == 2 else answer[1:])
    return made


@pytest.mark.parametrize("sms", [8, 16, 32, 64, 128])
def test_every_union_has_as_many_groups_each_once(script: Any, sms: int) -> None:
    (_, own), *found = script.arrangements(sms)
    assert own.sms == sms
    for name, partition in found:
        groups, count = partition.context
        assert partition.sms == sms
        assert len(set(groups)) == count == sms // 8, name
        assert set(groups) <= set(range(GROUPS))
    spread = found[-1][1].context[0]
    gaps = [b - a for a, b in itertools.pairwise(spread)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert "every second" in found[2][0] or sms > 64


def test_every_partition_is_read_on_and_the_whole_gpu_beside_them(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = SimpleNamespace(read_rate=lambda sms, stream: sms * 1e11 + (stream or 0))
    made = [("one", SimpleNamespace(stream=lambda: 7)), ("two", SimpleNamespace(stream=lambda: 8))]
    monkeypatch.setattr(script, "Bench", lambda _sources: rates)
    monkeypatch.setattr(script, "arrangements", lambda _sms: made)
    found = list(script.rows([16, 24]))
    assert [row["bytes_per_second"] - row["sms"] * 1e11 for row in found] == [0, 7, 8] * 2
    assert "  24 SMs, one " in capsys.readouterr().out


def test_what_is_no_multiple_of_a_group_is_refused(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_partitions", "--sms", "16", "12"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--sms: must be multiples of 8, not 12" in capsys.readouterr().err
