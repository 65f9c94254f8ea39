"""Weights of a Hugging Face model directory: safetensors files, memory-mapped, and fused as the model declares.

Format: https://huggingface.co/docs/safetensors. Every file is validated by the safetensors library; the byte offsets
are then read here, so that a loader can take a tensor straight from the page cache.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nf.errors import ModelError
from nf.models.declaration import Array, Model, ModelWeights, Weight
from nf.models.llama import LM_HEAD

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
# Buffers that old checkpoints carry and that are computed anew; any other unread tensor of the decoder is an error.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: ``num_bytes`` bytes from ``offset`` of ``path``, row-major, little-endian."""

    path: Path
    dtype: str  # safetensors' name: "BF16", "F16", "F32", or one that is not supported
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Checkpoint:
    """The tensors of a model directory: a table of entries and read-only maps of their files.

    The files stay mapped as long as the checkpoint or an array from it is alive.

    Raises:
        ModelError: no safetensors file is there, or one is missing, malformed or named outside the directory.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.entries: dict[str, TensorEntry] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        if (model_dir / SINGLE_FILE).exists():
            self._add_file(model_dir / SINGLE_FILE, None)
        elif (model_dir / INDEX_FILE).exists():
            for path, names in _read_index(model_dir / INDEX_FILE).items():
                self._add_file(path, names)
        else:
            raise _no_weights(model_dir)

    def tensor(self, name: str) -> Array:
        """The tensor as it lies in the page cache: read-only, its checkpoint dtype, no copy.

        Raises:
            ModelError: there is no such tensor, or it is neither bfloat16, float16 nor float32.
        """
        entry = self.entry(name)
        dtype = _dtype(name, entry)
        count = entry.num_bytes // dtype.itemsize
        return np.frombuffer(self._maps[entry.path], dtype, count, entry.offset).reshape(entry.shape)

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor lies.

        Raises:
            ModelError: there is no such tensor.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise ModelError(str(self.model_dir), f"tensor {name} is missing from the checkpoint") from None

    def _add_file(self, path: Path, names: list[str] | None) -> None:
        """Add the named tensors of a file, or all of them."""
        found = _read_header(path)
        for name in found if names is None else names:
            if name not in found:
                raise ModelError(str(path), f"tensor {name} is missing, which {INDEX_FILE} places in this file")
            self.entries[name] = found[name]
        with path.open("rb") as file:
            self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def load_weights(model: Model, model_dir: Path, dtype: np.dtype[Any]) -> ModelWeights:
    """Read, fuse and convert all weights of a model.

    Args:
        model: declaration of what must be there.
        model_dir: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.
        dtype: bfloat16 (ml_dtypes), float16 or float32; every array is contiguous and of this dtype.

    Raises:
        ModelError: a file is missing or malformed, the checkpoint does not fit the declaration (``check_weights``), or
            a value does not fit ``dtype``.
    """
    checkpoint = Checkpoint(model_dir)
    check_weights(model, checkpoint)
    embed = read_weight(checkpoint, model.embed, dtype)
    return ModelWeights(
        embed=embed,
        final_norm=read_weight(checkpoint, model.final_norm, dtype),
        lm_head=embed if is_tied(model) else read_weight(checkpoint, model.lm_head, dtype),
        layers=tuple(
            {weight.name: read_weight(checkpoint, weight, dtype, layer) for weight in model.layer_weights}
            for layer in range(model.config.num_layers)
        ),
    )


def random_weights(model: Model, seed: int, dtype: np.dtype[Any], std: float = 0.02) -> ModelWeights:
    """Weights for benchmarks, without a checkpoint: matrices N(0, std), biases 0, norms 1; the same for the same seed.

    (Those drawn on a GPU are others.)
    """
    rng = np.random.Generator(np.random.SFC64(seed))

    def draw(weight: Weight) -> Array:
        if len(weight.shape) == 1:
            return np.full(weight.shape, 1.0 if weight.name.endswith("_norm") else 0.0, dtype)
        values = rng.standard_normal(weight.shape, np.float32)
        values *= np.float32(std)
        return values.astype(dtype, copy=False)

    embed = draw(model.embed)
    return ModelWeights(
        embed=embed,
        final_norm=draw(model.final_norm),
        lm_head=embed if is_tied(model) else draw(model.lm_head),
        layers=tuple({w.name: draw(w) for w in model.layer_weights} for _ in range(model.config.num_layers)),
    )


def check_weights(model: Model, checkpoint: Checkpoint) -> None:
    """Compare the declaration with the checkpoint's table, before anything is allocated.

    Raises:
        ModelError: a tensor is missing, has another shape than the configuration means or a dtype that is not
            supported; or the checkpoint holds a decoder tensor (a bias, a further layer) that would be left out and so
            silently change results.
    """
    read = {LM_HEAD}  # when tied it is compared, see below
    for weight, layer in _weights(model):
        for name, shape in checkpoint_parts(weight, layer):
            entry = checkpoint.entry(name)
            if entry.shape != shape:
                raise ModelError(
                    str(entry.path), f"{name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}"
                )
            _dtype(name, entry)
            read.add(name)
    for name, entry in checkpoint.entries.items():
        decoder = name.startswith(("model.", "lm_head."))
        if decoder and name not in read and not name.endswith(HARMLESS_SUFFIXES):
            config = model.config
            raise ModelError(
                str(entry.path),
                f"{name} has no place in {config.architecture} with {config.num_layers} layers as config.json has it",
            )
    _check_tied(model, checkpoint)


def checkpoint_parts(weight: Weight, layer: int = 0) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the checkpoint tensors a weight of a layer is made of: expert by expert, part by part."""
    stacked = is_stacked(weight)
    for expert in range(weight.shape[0] if stacked else 1):
        for part, rows in zip(weight.parts, weight.part_rows, strict=True):
            yield part.format(layer=layer, expert=expert), (rows, *weight.shape[2 if stacked else 1 :])


def is_stacked(weight: Weight) -> bool:
    """Whether the weight has a leading dimension of experts."""
    return "{expert}" in weight.parts[0]


def read_weight(checkpoint: Checkpoint, weight: Weight, dtype: np.dtype[Any], layer: int = 0) -> Array:
    """One checked weight of one layer in its fused shape, copied out of the checkpoint.

    Raises:
        ModelError: it holds a value that float16 cannot.
    """
    fused: Array = np.empty(weight.shape, dtype)
    targets = (part for rows in (fused if is_stacked(weight) else [fused]) for part in _rows_of_parts(weight, rows))
    for (name, _), target in zip(checkpoint_parts(weight, layer), targets, strict=True):
        with np.errstate(over="ignore"):  # found below, for every source dtype alike
            target[...] = checkpoint.tensor(name).reshape(target.shape)
        if dtype == np.float16 and not np.isfinite(target).all():
            path = checkpoint.entry(name).path
            raise ModelError(str(path), f"{name} holds values that float16 cannot; use bfloat16 or float32")
    return fused


def _rows_of_parts(weight: Weight, rows: Array) -> Iterator[Array]:
    """Views of the rows that belong to each part."""
    start = 0
    for index, count in enumerate(weight.part_rows):
        if weight.interleave:
            blocks = rows.reshape(-1, len(weight.parts), weight.interleave, *rows.shape[1:])
            yield blocks[:, index]
        else:
            yield rows[start : start + count]
        start += count


def _weights(model: Model) -> Iterator[tuple[Weight, int]]:
    """Every weight of every layer, with its layer."""
    for weight in (model.embed, model.final_norm, model.lm_head):
        yield weight, 0
    for layer in range(model.config.num_layers):
        for weight in model.layer_weights:
            yield weight, layer


def _dtype(name: str, entry: TensorEntry) -> np.dtype[Any]:
    if entry.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise ModelError(str(entry.path), f"{name} has dtype {entry.dtype}, which is not supported; {known} are")
    return DTYPES[entry.dtype]


def is_tied(model: Model) -> bool:
    return model.lm_head.parts == model.embed.parts


def _check_tied(model: Model, checkpoint: Checkpoint) -> None:
    """A tied checkpoint may repeat the embedding as lm_head.weight, but then as the same numbers.

    transformers 4 would take the embedding, transformers 5 the lm_head: where they differ, the owner has to say.
    """
    if not is_tied(model) or LM_HEAD not in checkpoint.entries:
        return
    embed, lm_head = checkpoint.tensor(model.embed.parts[0]), checkpoint.tensor(LM_HEAD)
    slices = (slice(row, row + 4096) for row in range(0, len(embed), 4096))  # array_equal makes a mask of its size
    if embed.shape != lm_head.shape or not all(np.array_equal(embed[s], lm_head[s]) for s in slices):
        raise ModelError(
            str(checkpoint.entry(LM_HEAD).path),
            f"{LM_HEAD} differs from {model.embed.parts[0]}, but config.json sets tie_word_embeddings",
        )


def _read_index(path: Path) -> dict[Path, list[str]]:
    """Shards and the tensors the index places in them, in the index's order."""
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(str(path), f"is not valid JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(str(path), "weight_map must be an object that maps tensor names to file names")
    shards: dict[Path, list[str]] = {}
    for name, file_name in weight_map.items():
        # Only the name is judged: links are fine, the hub's cache is made of them.
        plain = isinstance(file_name, str) and not set(file_name) & set("/\\\0")
        if not plain or not file_name.endswith(".safetensors"):
            raise ModelError(
                str(path), f"{name} is placed in {file_name!r}; only .safetensors files of the same directory are read"
            )
        shards.setdefault(path.parent / file_name, []).append(name)
    for shard in shards:
        if not os.path.exists(shard):  # unlike Path's, False for a name that no file could have
            raise ModelError(str(shard), f"does not exist, but {INDEX_FILE} names it; download the model again")
    return shards


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The entries of a safetensors file, once the safetensors library finds it well-formed."""
    if path.is_dir():  # the library speaks of a device then
        raise ModelError(str(path), "is a directory, not a safetensors file")
    try:
        with safe_open(path, framework="numpy"):  # length, header size, overlap and overflow are checked here
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except SafetensorError as error:
        raise ModelError(str(path), f"is not a valid safetensors file: {error}") from error
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    data = 8 + header_bytes
    entries = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        entries[name] = TensorEntry(path, entry["dtype"], tuple(entry["shape"]), data + start, stop - start)
    return entries


def _no_weights(model_dir: Path) -> ModelError:
    pickled = sorted(path.name for pattern in PICKLED for path in model_dir.glob(pattern))
    if pickled:
        return ModelError(
            str(model_dir), f"holds only pickled weights ({pickled[0]}), which are never loaded; convert to safetensors"
        )
    return ModelError(str(model_dir), f"holds neither {SINGLE_FILE} nor {INDEX_FILE}")
