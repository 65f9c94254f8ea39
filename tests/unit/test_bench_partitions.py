"""scripts/bench_partitions.py: which SMs its partitions have, on a double of the driver, and what it refuses."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_bench_scripts import load_script

PAIRS = 66


class Driver:
    """In one piece the driver gives what it wants."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)

    cuDeviceGet = staticmethod(lambda ordinal: (0, ordinal))  # noqa: N815
    cuDeviceGetDevResource = staticmethod(lambda *_: (0, "whole"))  # noqa: N815
    cuDevSmResourceSplitByCount = staticmethod(lambda count, *_: (0, ["piece"] * count, count, None))  # noqa: N815


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A partition is the resources that it was made of."""
    bindings = ModuleType("cuda.bindings")
    bindings.driver = Driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    made = load_script("bench_partitions", monkeypatch)
    monkeypatch.setattr(made, "partitions", lambda counts: [f"{counts[0]} SMs"])
    monkeypatch.setattr(made, "sm_pairs", lambda _device: list(range(PAIRS)))
    monkeypatch.setattr(made, "partition_of", lambda pairs, _device: pairs)
    monkeypatch.setattr(made, "checked", lambda answer: answer[1] if len(answer) == 2 else answer[1:])
    return made


@pytest.mark.parametrize("sms", [2, 20, 132])
def test_the_engines_partition_stands_beside_other_choices_of_as_many_sms(script: Any, sms: int) -> None:
    found = dict(script.arrangements(sms))
    assert found == {
        "spread": f"{sms} SMs",
        "the driver's": ["piece"],
        "the first": list(range(sms // 2)),
        "the last": list(range(PAIRS - sms // 2, PAIRS)),
    }


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


def test_an_odd_number_of_sms_is_refused(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_partitions", "--sms", "16", "13"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--sms: must be even and at least 2, not 13" in capsys.readouterr().err
