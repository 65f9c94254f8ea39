"""Loading: fusion against the safetensors library's own arrays, dtypes, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from nf.errors import ModelError
from nf.models.declaration import Model
from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.weights import Checkpoint, load_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
FLOAT32 = np.dtype(np.float32)
L0 = "model.layers.0."


def declared(directory: Path) -> Model:
    return declare(read_config(directory))


def plain(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a directory as float32, read by the safetensors library."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def parts_of(gate_up: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Gate and up of a fused weight: rows 0 … 7 are gate, 8 … 15 up, 16 … 23 gate again."""
    is_up = np.arange(len(gate_up)) // 8 % 2 == 1
    return gate_up[~is_up], gate_up[is_up]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A copy of a single-file model (untied, no bias) to be spoilt."""
    return Path(shutil.copytree(FIXTURES / "mistral", tmp_path / "model"))


def rewrite(directory: Path, changes: dict[str, Any]) -> None:
    """Replace tensors of model.safetensors; None removes one."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors") | changes
    kept = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(kept, directory / "model.safetensors")


@pytest.mark.parametrize("name", ["llama", "llama-tied-llama3", "llama-bias-linear", "mistral", "qwen2", "qwen3"])
def test_dense_fusion(name: str) -> None:
    tensors = plain(FIXTURES / name)
    model = declared(FIXTURES / name)
    weights = load_weights(model, FIXTURES / name, FLOAT32)
    assert len(weights.layers) == model.config.num_layers
    np.testing.assert_array_equal(weights.embed, tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights.final_norm, tensors["model.norm.weight"])
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        qkv = [tensors[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
        np.testing.assert_array_equal(layer["qkv_proj"], np.concatenate(qkv))
        np.testing.assert_array_equal(parts_of(layer["gate_up_proj"])[0], tensors[prefix + "mlp.gate_proj.weight"])
        np.testing.assert_array_equal(parts_of(layer["gate_up_proj"])[1], tensors[prefix + "mlp.up_proj.weight"])
        np.testing.assert_array_equal(layer["down_proj"], tensors[prefix + "mlp.down_proj.weight"])
        np.testing.assert_array_equal(layer["o_proj"], tensors[prefix + "self_attn.o_proj.weight"])
        np.testing.assert_array_equal(layer["attn_norm"], tensors[prefix + "input_layernorm.weight"])
        np.testing.assert_array_equal(layer["ffn_norm"], tensors[prefix + "post_attention_layernorm.weight"])
        if model.config.qkv_bias:
            bias = [tensors[f"{prefix}self_attn.{part}_proj.bias"] for part in "qkv"]
            np.testing.assert_array_equal(layer["qkv_bias"], np.concatenate(bias))
        if model.config.o_bias:
            np.testing.assert_array_equal(layer["o_bias"], tensors[prefix + "self_attn.o_proj.bias"])
        if model.config.qk_norm:
            np.testing.assert_array_equal(layer["q_norm"], tensors[prefix + "self_attn.q_norm.weight"])
            np.testing.assert_array_equal(layer["k_norm"], tensors[prefix + "self_attn.k_norm.weight"])
        for weight in model.layer_weights:
            array = layer[weight.name]
            assert array.shape == weight.shape
            assert array.dtype == FLOAT32
            assert array.flags.c_contiguous


def test_experts_are_stacked() -> None:
    tensors = plain(FIXTURES / "mixtral")
    weights = load_weights(declared(FIXTURES / "mixtral"), FIXTURES / "mixtral", FLOAT32)
    for index, layer in enumerate(weights.layers):
        moe = f"model.layers.{index}.block_sparse_moe."
        np.testing.assert_array_equal(layer["router"], tensors[moe + "gate.weight"])
        for expert in range(4):
            w1, w2, w3 = (tensors[f"{moe}experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            np.testing.assert_array_equal(parts_of(layer["moe_gate_up_proj"][expert])[0], w1)
            np.testing.assert_array_equal(parts_of(layer["moe_gate_up_proj"][expert])[1], w3)
            np.testing.assert_array_equal(layer["moe_down_proj"][expert], w2)


def test_tied_lm_head_is_the_embedding() -> None:
    weights = load_weights(declared(FIXTURES / "qwen3"), FIXTURES / "qwen3", FLOAT32)
    assert weights.lm_head is weights.embed
    layers = sum(array.nbytes for layer in weights.layers for array in layer.values())
    assert weights.num_bytes == weights.embed.nbytes + weights.final_norm.nbytes + layers
    untied = load_weights(declared(FIXTURES / "llama"), FIXTURES / "llama", FLOAT32)
    np.testing.assert_array_equal(untied.lm_head, plain(FIXTURES / "llama")["lm_head.weight"])


@pytest.mark.parametrize("name", ["llama", "deepseek", "qwen2"])  # float32, bfloat16, float16 on disk
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_conversion(name: str, dtype: Any) -> None:
    tensors = plain(FIXTURES / name)
    weights = load_weights(declared(FIXTURES / name), FIXTURES / name, np.dtype(dtype))
    for loaded, tensor in [
        (weights.embed, "model.embed_tokens.weight"),
        (weights.layers[1]["down_proj"], "model.layers.1.mlp.down_proj.weight"),
        (parts_of(weights.layers[2]["gate_up_proj"])[1], "model.layers.2.mlp.up_proj.weight"),
    ]:
        assert loaded.dtype == dtype
        np.testing.assert_array_equal(loaded, tensors[tensor].astype(dtype))


def test_float16_overflow_is_found(model_dir: Path) -> None:
    for huge in (np.full(32, 1e30, np.float32), np.full(32, 1e30, ml_dtypes.bfloat16)):
        rewrite(model_dir, {"model.norm.weight": huge})
        load_weights(declared(model_dir), model_dir, FLOAT32)
        with pytest.raises(ModelError, match=r"model\.norm\.weight holds values that float16 cannot"):
            load_weights(declared(model_dir), model_dir, np.dtype(np.float16))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_checkpoint_is_mapped_where_its_table_says(name: str) -> None:
    checkpoint = Checkpoint(FIXTURES / name)
    tensors = plain(FIXTURES / name)
    assert checkpoint.entries.keys() == tensors.keys()
    for tensor, expected in tensors.items():
        entry, array = checkpoint.entry(tensor), checkpoint.tensor(tensor)
        np.testing.assert_array_equal(array.astype(np.float32), expected)
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert entry.path.read_bytes()[entry.offset : entry.offset + entry.num_bytes] == array.tobytes()


def test_weights_outlive_their_files(model_dir: Path) -> None:
    expected = plain(model_dir)["model.embed_tokens.weight"]
    weights = load_weights(declared(model_dir), model_dir, FLOAT32)
    (model_dir / "model.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(weights.embed, expected)


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_weights(declared(directory), directory, FLOAT32)


def with_header(header: bytes, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(start: int, stop: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "no header": b"\x10\0\0",
        "oversized header": with_header(b"{}", length=2**40),
        "header beyond the file": with_header(b"{}", length=1000),
        "not JSON": with_header(b"hello"),
        "overlap": with_header(json.dumps({"a": entry(0, 40, [10]), "b": entry(24, 64, [10])}).encode()),
        "hole": with_header(json.dumps({"a": entry(0, 16, [4]), "b": entry(32, 64, [8])}).encode()),
        "beyond the data": with_header(json.dumps({"a": entry(0, 128, [32])}).encode()),
        "backwards": with_header(json.dumps({"a": entry(64, 0, [16])}).encode()),
        "shape that overflows": with_header(json.dumps({"a": entry(0, 64, [2**40, 2**40])}).encode()),
        "shape and bytes differ": with_header(json.dumps({"a": entry(0, 64, [15])}).encode()),
        "negative shape": with_header(json.dumps({"a": entry(0, 64, [-4, -4])}).encode()),
    }.items(),
    ids=lambda case: case[0],
)
def test_malformed_file(model_dir: Path, content: tuple[str, bytes]) -> None:
    (model_dir / "model.safetensors").write_bytes(content[1])
    refused(model_dir, r"model\.safetensors: is not a valid safetensors file")


def test_truncated_file(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(model_dir, r"model\.safetensors: is not a valid safetensors file")


def test_shape_differs_from_config(model_dir: Path) -> None:
    rewrite(model_dir, {L0 + "self_attn.k_proj.weight": np.zeros((16, 32), np.float32)})
    refused(model_dir, r"self_attn\.k_proj\.weight has shape \[16, 32\], but config\.json asks for \[24, 32\]")


def test_absurd_config_allocates_nothing(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"vocab_size": 2**31 - 1}))
    refused(model_dir, r"has shape \[160, 32\], but config\.json asks for \[2147483647, 32\]")
    (model_dir / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**31 - 1}))
    refused(model_dir, r"tensor model\.layers\.3\.input_layernorm\.weight is missing")


def test_missing_tensor(model_dir: Path) -> None:
    rewrite(model_dir, {L0 + "mlp.up_proj.weight": None})
    refused(model_dir, r"tensor model\.layers\.0\.mlp\.up_proj\.weight is missing from the checkpoint")


def test_unexpected_dtype(model_dir: Path) -> None:
    rewrite(model_dir, {"model.norm.weight": np.zeros(32, np.float64)})
    refused(model_dir, r"model\.norm\.weight has dtype F64, which is not supported; BF16, F16, F32 are")


def test_decoder_tensor_that_would_be_left_out(model_dir: Path) -> None:
    rewrite(model_dir, {L0 + "self_attn.q_proj.bias": np.ones(48, np.float32)})
    refused(model_dir, r"self_attn\.q_proj\.bias has no place in MistralForCausalLM")


def test_further_layer(model_dir: Path) -> None:
    model = declared(model_dir)
    shorter = replace(model, config=replace(model.config, num_layers=2))
    with pytest.raises(ModelError, match=r"model\.layers\.2\..* has no place in MistralForCausalLM with 2 layers"):
        load_weights(shorter, model_dir, FLOAT32)


def test_tensors_that_change_nothing_are_passed_over(model_dir: Path) -> None:
    before = load_weights(declared(model_dir), model_dir, FLOAT32)
    rewrite(model_dir, {L0 + "self_attn.rotary_emb.inv_freq": np.ones(6, np.float32), "score.weight": np.ones((1, 32))})
    after = load_weights(declared(model_dir), model_dir, FLOAT32)
    np.testing.assert_array_equal(before.layers[0]["qkv_proj"], after.layers[0]["qkv_proj"])


def test_tied_checkpoint_with_its_own_lm_head(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "model"))
    embed = plain(directory)["model.embed_tokens.weight"]
    rewrite(directory, {"lm_head.weight": embed})
    weights = load_weights(declared(directory), directory, FLOAT32)
    assert weights.lm_head is weights.embed
    rewrite(directory, {"lm_head.weight": embed + 1})
    refused(directory, r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings")


def test_pickled_weights_are_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    refused(model_dir, r"holds only pickled weights \(pytorch_model\.bin\), which are never loaded")


def test_no_weights_at_all(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    refused(model_dir, r"holds neither model\.safetensors nor model\.safetensors\.index\.json")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))


def edit_index(directory: Path, changes: dict[str, Any]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index))


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, r"model-00002-of-00003\.safetensors: does not exist, but model\.safetensors\.index\.json names it")


def test_shard_of_a_name_no_file_can_have(sharded: Path) -> None:
    edit_index(sharded, {"model.norm.weight": "x" * 5000 + ".safetensors"})
    refused(sharded, r"xxx\.safetensors: does not exist, but model\.safetensors\.index\.json names it")


def test_a_directory_is_not_a_file_of_tensors(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors").mkdir()
    refused(model_dir, r"model\.safetensors: is a directory, not a safetensors file")


@pytest.mark.parametrize(
    "place",
    ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "..", "sub/x.safetensors", "x.bin", 7],
)
def test_index_names_only_files_of_its_directory(sharded: Path, place: Any) -> None:
    shutil.copy(FIXTURES / "mistral" / "model.safetensors", sharded.parent / "model.safetensors")
    edit_index(sharded, {"model.norm.weight": place})
    refused(
        sharded, r"index\.json: model\.norm\.weight is placed in .*; only \.safetensors files of the same directory"
    )


def test_index_places_a_tensor_in_the_wrong_shard(sharded: Path) -> None:
    edit_index(sharded, {"model.norm.weight": "model-00001-of-00003.safetensors"})
    refused(sharded, r"model-00001-of-00003\.safetensors: tensor model\.norm\.weight is missing")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_malformed_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, r"index\.json: (is not valid JSON|weight_map must be an object)")


def test_links_like_the_hub_cache_are_followed(sharded: Path) -> None:
    blobs = sharded.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.glob("*.safetensors"))):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    weights = load_weights(declared(sharded), sharded, FLOAT32)
    np.testing.assert_array_equal(weights.lm_head, plain(FIXTURES / "llama")["lm_head.weight"])
