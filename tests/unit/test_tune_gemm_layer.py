"""scripts/tune_gemm_layer.py: what it tries for few rows, and what its record puts into the table; made-up layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_bench_scripts import load_script

from nf.bench.gemm_cases import MODELS
from nf.kernels.gemm import EVICTIONS, GemmConfig

MODEL = "llama-3-8b"
COSTS = {"gate_up": 0.8, "down": 0.4, "qkv": 0.2, "o": 0.1}  # of not being at one's best, in seconds


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return load_script("tune_gemm_layer", monkeypatch)


class Layer:
    """Takes 1 s, and longer for every product that is not at its best, which depends on the product before it; longest
    for the one that takes longest itself."""

    shapes = MODELS[MODEL]

    def __init__(self, rows: int, configs: list[GemmConfig]) -> None:
        self.rows, self._configs = rows, configs

    def cublas(self) -> float:
        return 3.0

    def best(self, choices: dict[str, GemmConfig]) -> dict[str, GemmConfig]:
        """gate_up's is the second; of any other, the one behind that of the product before in the layer."""
        names, found = list(self.shapes), {}
        for name in names:
            before = choices[names[names.index(name) - 1]]
            place = self._configs.index(before) + 1 if before in self._configs else 0
            found[name] = self._configs[1 if name == "gate_up" else place % len(self._configs)]
        return found

    def seconds(self, choices: dict[str, GemmConfig], *, steady: bool = False) -> float:
        assert choices.keys() == self.shapes.keys()
        best = self.best(choices)
        wrong = [name for name in choices if choices[name] != best[name]]
        if wrong == ["o"] and choices["o"] == self._configs[-1] and not steady:
            return 0.9  # seems faster than any layer is
        return 1 + sum(COSTS[name] for name in wrong)


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("evict", EVICTIONS)
def test_candidates_are_for_so_many_rows_and_for_partitions(script: Any, rows: int, evict: str) -> None:
    configs = script.candidates(rows, evict)
    assert len({*configs}) == len(configs) > 2
    for config in configs:
        assert config.swap
        assert config.tile_n == rows
        assert config.cluster_size <= 2
        assert config.evict == evict


def test_the_table_gets_what_was_best_beside_the_others(script: Any, tmp_path: Path) -> None:
    """Each product's best depends on its neighbour: what a product alone would take is not what it gets; nor does it
    get what was faster at first glance only."""
    import tune_gemm

    configs = script.candidates(16, "")
    layer = Layer(16, configs)
    points = script.descend(layer, MODEL, configs)
    assert [point["name"] for point in points] == list(layer.shapes)
    assert all(point["tried"].keys() >= {config.label for config in configs} for point in points)
    record = tmp_path / "layer.json"
    record.write_text(json.dumps({"date": "2026-01-01", "points": points}))
    entries = tune_gemm.reduce([record])["entries"]
    choices = {entry["name"]: GemmConfig.from_label(entry["config"]) for entry in entries}
    assert choices == layer.best(choices)
    assert layer.seconds(choices) == 1
    assert all("us" not in entry and "cublas" not in entry for entry in entries)  # the seconds are the layer's
