"""Choosing a GEMM configuration: the table where it has the shape, a sensible rule elsewhere, clear errors."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.errors import InputError
from nf.kernels.gemm import (
    EVICTIONS,
    GROUPED,
    TABLE,
    TILE_K,
    Epilogue,
    GemmChoice,
    GemmConfig,
    GemmKernels,
    choose,
    configurations,
    cost,
    sources,
)

ENTRIES = json.loads(TABLE.read_text())["entries"]
EPILOGUES: tuple[Epilogue, ...] = ("none", "bias", "residual", "swiglu")


@pytest.mark.parametrize(
    "entry", ENTRIES, ids=lambda entry: f"{entry['n']}x{entry['k']}-{entry['rows']}-{entry['sms']}"
)
def test_a_measured_point_gets_what_was_measured(entry: dict[str, int | str]) -> None:
    choice = choose(int(entry["n"]), int(entry["k"]), int(entry["rows"]), int(entry["sms"]))
    assert choice.config.label == entry["config"]
    assert choice.group == entry["group"]


def test_no_cluster_needs_more_than_a_pair_of_sms() -> None:
    """Partitions promise no more (nf.graphs.partition.BY_PAIRS)."""
    assert max(config.cluster_size for config in (*configurations(), *GROUPED)) == 2


def test_labels_name_configurations() -> None:
    for config in configurations():
        assert GemmConfig.from_label(config.label) == config
    assert GemmConfig.from_label("64x16_1x1x2_swapped") == GemmConfig(64, 16, split=2, swap=True)
    for evict in EVICTIONS:
        for swap in (False, True):
            config = GemmConfig(128, 64, 2, swap=swap, evict=evict)
            assert GemmConfig.from_label(config.label) == config
    for wrong in ("128x64", "128x64_1x1x1_ff", "128x64_1x1x1_swapped_lf_nf"):
        with pytest.raises(ValueError, match=r".+"):
            GemmConfig.from_label(wrong)


@settings(deadline=None, max_examples=200)
@given(
    n=st.integers(1, 9000).map(lambda n: 16 * n),
    k=st.integers(8, 4000).map(lambda k: 8 * k),
    rows=st.integers(1, 10000),
    sms=st.integers(8, 132),
    epilogue=st.sampled_from(EPILOGUES),
)
def test_every_shape_gets_a_kernel_that_can_serve_it(n: int, k: int, rows: int, sms: int, epilogue: Epilogue) -> None:
    config = choose(n, k, rows, sms, epilogue).config
    assert config.serves(epilogue)
    assert config.split * TILE_K <= k
    assert config.source(epilogue).name in {source.name for source in sources()}
    assert 1 <= config.clusters(sms) * config.cluster_size <= max(sms * config.residents, config.cluster_size)


@given(n=st.integers(1, 9000), rows=st.integers(1, 10000), config=st.sampled_from([*configurations(), *GROUPED]))
def test_tiles_cover_the_product(n: int, rows: int, config: GemmConfig) -> None:
    m, columns = (n, rows) if config.swap else (rows, n)
    down, across = config.tile_m * config.cluster_m, config.tile_n * config.cluster_n
    assert config.tiles(n, rows) == math.ceil(m / down) * math.ceil(columns / across)


def test_few_rows_get_swapped_operands_and_many_do_not() -> None:
    for n, k in ((4608, 3584), (152064, 3584), (6144, 4096)):
        assert choose(n, k, 4, 132).config.swap
        assert not choose(n, k, 4096, 132).config.swap


def test_the_rule_prefers_tiles_that_fill_whole_rounds() -> None:
    wide, narrow = GemmConfig(128, 256, 2, 1), GemmConfig(128, 192, 2, 1)
    # 192 tiles of 256 columns take two rounds on 132 SMs, half of the second empty; 256 of 192 columns fill two.
    assert cost(narrow, 6144, 4096, 1024, 132) < cost(wide, 6144, 4096, 1024, 132)
    assert cost(wide, 28672, 4096, 2048, 132) < cost(narrow, 28672, 4096, 2048, 132)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"n": 100}, "n, k"), ({"k": 100}, "n, k"), ({"k": 8}, "n, k"), ({"capacity": 0}, "capacity")],
)
def test_sizes_that_no_kernel_serves(changes: dict[str, int], field: str) -> None:
    size = {"n": 128, "k": 128, "capacity": 8} | changes
    with pytest.raises(InputError, match=field):
        GemmKernels([]).product(size["n"], size["k"], size["capacity"], sms=132)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sms": 0}, "sms"),
        ({"num_experts": 0}, "num_experts"),
        ({"epilogue": "gelu"}, "epilogue, output"),
        ({"output": "float16"}, "epilogue, output"),
        ({"choice": GemmChoice(GemmConfig(64, 16, split=4, swap=True))}, "choice: 64x16_1x1x4_swapped .* at k = 128"),
        ({"choice": GemmChoice(GemmConfig(128, 256), group=0)}, "choice"),
        ({"choice": GemmChoice(GemmConfig(64, 16, swap=True)), "capacity": 1 << 24}, "capacity: .* less than 2³¹"),
    ],
)
def test_arguments_that_no_launch_can_have(changes: dict[str, Any], field: str) -> None:
    arguments = {"n": 128, "k": 128, "capacity": 8, "sms": 132} | changes
    with pytest.raises(InputError, match=field):
        GemmKernels([]).product(**arguments)


def test_a_choice_needs_a_tile_of_k() -> None:
    with pytest.raises(InputError, match="k: a GEMM needs k ≥ 64, not 32"):
        choose(4096, 32, 16, 132)


def test_labels_name_configurations_and_nothing_else() -> None:
    for config in configurations():
        assert GemmConfig.from_label(config.label) == config
    for label in ("nonsense", "0x0_0x0x0", "-64x16_1x1x1", "64x16_1x1x1_", "192x128_1x1x1", "128x128_1x1x1_xx"):
        with pytest.raises(ValueError, match=r".*"):
            GemmConfig.from_label(label)


def test_combinations_that_are_not_compiled() -> None:
    with pytest.raises(InputError, match="output"):
        GemmKernels([]).product(128, 128, 8, sms=132, epilogue="residual", output="float32")
    with pytest.raises(InputError, match="epilogue"):
        GemmKernels([]).product(128, 128, 128, sms=132, epilogue="bias", num_experts=8)
