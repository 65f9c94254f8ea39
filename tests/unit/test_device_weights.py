"""Where weights lie on the GPU and what is copied there, done here with NumPy and held against the CPU's loading."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nf.executors import gpu_weights
from nf.executors.array_layout import ALIGNMENT
from nf.executors.gpu_weights import layout
from nf.hub import BUNDLED_DIR
from nf.models.declaration import Model
from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.models.shapes import SHAPES
from nf.weights import Checkpoint, load_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
DIRECTORIES = [
    *(FIXTURES / name for name in ("llama", "llama-tied-llama3", "llama-bias-linear", "qwen2", "qwen3", "mixtral")),
    BUNDLED_DIR,
]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def placed(model: Model) -> list[tuple[int, int]]:
    """Start and stop of every weight, a tied lm_head not counted."""
    places = layout(model)
    sizes = {w.name: 2 * math.prod(w.shape) for w in model.layer_weights}
    spans = [(place, place + sizes[name]) for layer in places.layers for name, place in layer.items()]
    ends = {places.embed: model.embed, places.final_norm: model.final_norm, places.lm_head: model.lm_head}
    return spans + [(place, place + 2 * math.prod(weight.shape)) for place, weight in ends.items()]


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_aligned_apart_and_dense(name: str) -> None:
    model = declare(SHAPES[name])
    spans = sorted(placed(model))
    assert all(start % ALIGNMENT == 0 for start, _ in spans)
    gaps = [start - stop for (_, stop), (start, _) in itertools.pairwise(spans)]
    assert all(0 <= gap < ALIGNMENT for gap in gaps)
    assert 0 <= layout(model).num_bytes - spans[-1][1] < ALIGNMENT


def test_a_tied_lm_head_has_no_place_of_its_own() -> None:
    model = declare(read_config(FIXTURES / "llama-tied-llama3"))
    assert layout(model).lm_head == layout(model).embed


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 30])
def test_chunks_build_the_fused_weights(directory: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of single runs, of a few and of whole tensors; together they write every value once."""
    monkeypatch.setattr(gpu_weights, "CHUNK_BYTES", chunk_bytes)
    model = declare(read_config(directory))
    places = layout(model)
    memory = np.full(places.num_bytes // 2, -1, np.int32)  # room to see what was never written
    for chunk in gpu_weights._chunks(model, Checkpoint(directory), places):
        values = np.fromfile(chunk.path, chunk.dtype, chunk.count, offset=chunk.offset).astype(BFLOAT16)
        rows = chunk.place // 2 + chunk.pitch * np.arange(chunk.runs)[:, None] + np.arange(chunk.run)
        assert (memory[rows] == -1).all()
        memory[rows] = values.view(np.uint16).reshape(chunk.runs, chunk.run)
    expected = load_weights(model, directory, BFLOAT16)

    def check(array: np.ndarray[Any, Any], place: int) -> None:
        np.testing.assert_array_equal(memory[place // 2 :][: array.size], array.view(np.uint16).ravel())

    check(expected.embed, places.embed)
    check(expected.final_norm, places.final_norm)
    check(expected.lm_head, places.lm_head)
    for layer, offsets in zip(expected.layers, places.layers, strict=True):
        assert layer.keys() == offsets.keys()
        for name, array in layer.items():
            check(array, offsets[name])
