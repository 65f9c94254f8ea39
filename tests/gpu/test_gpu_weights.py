"""Weights on the GPU, read back: bit for bit those that the CPU loads as bfloat16, and random ones by their moments."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nf.errors import ModelError
from nf.executors import gpu_weights
from nf.executors.gpu_weights import DeviceWeights, load_device_weights, random_device_weights
from nf.hub import BUNDLED_DIR
from nf.kernels.device import Device, DeviceMemory, DeviceMemoryError
from nf.models.declaration import Model, Weight
from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.weights import checkpoint_parts, load_weights

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

FIXTURES = Path(__file__).parents[1] / "fixtures"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DIRECTORIES = [path.parent for path in sorted(FIXTURES.glob("*/config.json"))] + [BUNDLED_DIR]


@pytest.fixture(autouse=True)
def device() -> Iterator[Device]:
    """No test leaves memory behind."""
    device = Device()
    free = device.memory()[0]
    yield device
    assert device.memory()[0] >= free - (64 << 20)  # a first launch makes the driver keep some


def read_back(weights: DeviceWeights, weight: Weight, pointer: int) -> np.ndarray[Any, Any]:
    array = np.empty(weight.shape, BFLOAT16)
    weights.memory.download(array, pointer - weights.memory.pointer)
    return array


def assert_equal(model: Model, weights: DeviceWeights, model_dir: Path) -> None:
    expected = load_weights(model, model_dir, BFLOAT16)
    pairs = [
        (expected.embed, model.embed, weights.embed),
        (expected.final_norm, model.final_norm, weights.final_norm),
        (expected.lm_head, model.lm_head, weights.lm_head),
    ]
    for arrays, pointers in zip(expected.layers, weights.layers, strict=True):
        assert arrays.keys() == pointers.keys()
        pairs += [(arrays[w.name], w, pointers[w.name]) for w in model.layer_weights]
    for array, weight, pointer in pairs:
        assert pointer % 256 == 0
        np.testing.assert_array_equal(
            read_back(weights, weight, pointer).view(np.uint16), array.view(np.uint16), weight.name
        )
    assert (weights.lm_head == weights.embed) == (expected.lm_head is expected.embed)


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
@pytest.mark.parametrize("chunk_bytes", [1, 3000, gpu_weights.CHUNK_BYTES])
def test_loaded_weights_are_the_cpus(directory: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_weights, "CHUNK_BYTES", chunk_bytes)
    model = declare(read_config(directory))
    weights = load_device_weights(model, directory)
    assert_equal(model, weights, directory)
    weights.free()
    weights.free()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_every_dtype_on_disk(name: str, dtype: str, tmp_path: Path) -> None:
    """Rounded to nearest even; infinities, NaN and what bfloat16 cannot hold as the CPU has them."""
    shutil.copy(FIXTURES / name / "config.json", tmp_path)
    model = declare(read_config(tmp_path))
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(1)
    tensors = {part: rng.standard_normal(shape).astype(kind) for part, shape in parts(model)}
    embed = tensors["model.embed_tokens.weight"]
    with np.errstate(over="ignore"):
        embed[0, :6] = np.array([np.inf, -np.inf, np.nan, 3.4e38, -0.0, 1e-41], np.float32).astype(kind)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load_device_weights(model, tmp_path)
    assert_equal(model, weights, tmp_path)
    weights.free()


def parts(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    for weight in (model.embed, model.final_norm, model.lm_head):
        yield from checkpoint_parts(weight)
    for layer in range(model.config.num_layers):
        for weight in model.layer_weights:
            yield from checkpoint_parts(weight, layer)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both before it is opened and, as under a download that goes wrong, after its header was checked."""
    model_dir = Path(shutil.copytree(FIXTURES / "mistral", tmp_path / "model"))
    model = declare(read_config(model_dir))
    file = model_dir / "model.safetensors"
    size = file.stat().st_size

    def check_and_cut(*_: object) -> None:
        os.truncate(file, size - 1000)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_weights, "check_weights", check_and_cut)
        with pytest.raises(ModelError, match=r"model\.safetensors: ends \d+ bytes before its tensors do$"):
            load_device_weights(model, model_dir)
    with pytest.raises(ModelError, match=r"model\.safetensors: is not a valid safetensors file"):
        load_device_weights(model, model_dir)


def test_random_weights() -> None:
    model = declare(read_config(BUNDLED_DIR))
    weights = random_device_weights(model, seed=2**64 - 1, std=0.05)
    ends = [(model.embed, weights.embed), (model.lm_head, weights.lm_head), (model.final_norm, weights.final_norm)]
    inner = [(w, layer[w.name]) for layer in weights.layers for w in model.layer_weights]
    seen: dict[int, np.ndarray[Any, Any]] = {}
    for weight, pointer in ends + inner:
        values = read_back(weights, weight, pointer).astype(np.float64).ravel()
        if len(weight.shape) == 1:
            assert (values == 1).all()
            continue
        count = math.prod(weight.shape)
        assert abs(values.mean()) < 5 * 0.05 / count**0.5
        assert abs(values.std() / 0.05 - 1) < 5 / (2 * count) ** 0.5 + 1e-3
        assert abs((values / 0.05).__pow__(4).mean() - 3) < 5 * (96 / count) ** 0.5 + 0.02
        for others in (values[1:], *(v for p, v in seen.items() if p != pointer)):  # neighbours, and other matrices
            length = min(count - 1, len(others))
            assert abs(np.corrcoef(values[:length], others[:length])[0, 1]) < 6 / length**0.5
        seen[pointer] = values[: 1 << 16]
    again, other = random_device_weights(model, 2**64 - 1, 0.05), random_device_weights(model, 1, 0.05)
    first = model.layer_weights[1]
    assert len(first.shape) == 2
    base = read_back(weights, first, weights.layers[1][first.name])
    assert (read_back(again, first, again.layers[1][first.name]) == base).all()
    assert (read_back(other, first, other.layers[1][first.name]) != base).mean() > 0.95
    for made in (weights, again, other):
        made.free()


def test_biases_are_zero() -> None:
    model = declare(read_config(FIXTURES / "qwen2"))
    weights = random_device_weights(model, 0)
    bias = next(weight for weight in model.layer_weights if weight.name == "qkv_bias")
    for layer in weights.layers:
        assert (read_back(weights, bias, layer["qkv_bias"]) == 0).all()
    weights.free()


def test_too_little_memory_says_how_much(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    hog = DeviceMemory(device.memory()[0] - (64 << 20), "hog")
    monkeypatch.setattr(gpu_weights, "VALUE_BYTES", 1 << 16)  # a larger model
    with pytest.raises(DeviceMemoryError, match=r"^weights need \d+\.\d\d GiB of GPU memory, and 0\.\d\d of .* free$"):
        load_device_weights(declare(read_config(BUNDLED_DIR)), BUNDLED_DIR)
    hog.free()
