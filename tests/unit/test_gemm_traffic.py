"""scripts/gemm_traffic.py: the order of tiles, the cache, and what follows of both."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bench_scripts import load_script

from nf.kernels.gemm import GemmChoice, GemmConfig


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield load_script("gemm_traffic", patch)


@settings(deadline=None, max_examples=60)
@given(m_blocks=st.integers(1, 9), n_blocks=st.integers(1, 30), group=st.integers(1, 40))
def test_tiles_come_as_the_kernel_gives_them_out(script: Any, m_blocks: int, n_blocks: int, group: int) -> None:
    expected = []
    for work in range(m_blocks * n_blocks):  # _tile_of in kernels/gemm_units_cute.py
        first = work // (m_blocks * group) * group
        width = min(n_blocks - first, group)
        rest = work - first * m_blocks
        expected.append((rest // width, first + rest % width))
    assert list(script.tile_order(m_blocks, n_blocks, group)) == expected


@pytest.mark.parametrize("evict", ["", "nf", "lf", "fl"])
def test_with_room_for_everything_each_operand_is_read_once(script: Any, evict: str) -> None:
    choice = GemmChoice(GemmConfig(128, 256, 2, 1, evict=evict))
    assert script.traffic(choice, 4096, 2048, 1024, 1e12) == 2 * 2048 * (1024 + 4096)


def test_without_room_every_wave_reads_its_operands_again(script: Any) -> None:
    choice = GemmChoice(GemmConfig(128, 128), group=1000)  # 1056 tiles of one row of blocks: 8 waves of 132
    x, w = 2 * 128 * 2048, 2 * 128 * 2048 * 1056
    assert script.traffic(choice, 128 * 1056, 2048, 128, 1.0) == 8 * x + w


def test_what_is_to_be_dropped_last_stays(script: Any) -> None:
    cache = script.Cache(100.0)
    cache.read(("x", 0, 0), 40.0, "l")
    for i in range(10):
        cache.read(("w", i, 0), 40.0, "f")
    cache.read(("x", 0, 0), 40.0, "l")
    assert cache.missed == 11 * 40.0
    cache.read(("w", 8, 0), 40.0, "f")
    assert cache.missed == 12 * 40.0


def test_evictions_help_where_a_wave_fills_the_cache(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gemm_traffic", "--rows", "2048", "--cache", "40"])
    assert script.main() == 0
    *products, layer = capsys.readouterr().out.splitlines()
    assert len(products) == 4
    now, best, fewest = (float(number) for number in re.findall(r"(\d+) (?:MB now|best|fewest)", layer))
    assert fewest < best < now
