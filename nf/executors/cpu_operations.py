"""The operations of a layer in NumPy, float32: a table from an operation's name to the function that runs it.

Each function works on rows [start, stop) of the buffers; decode and prefill attention get rows of their kind alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from nf.config import ModelConfig
from nf.executors.cpu_attention import TileShape, attend
from nf.executors.cpu_cache import PagedCache
from nf.executors.cpu_gemm import Projection, project
from nf.executors.cpu_step import Step
from nf.executors.cpu_weights import CpuWeights
from nf.executors.rope import rotate

Float32 = NDArray[np.float32]


class Activations:
    """The buffers operations read and write, one row per token of the dense batch (but for "kv", the cache)."""

    def __init__(self, config: ModelConfig, dense_batch_size: int) -> None:
        def rows(*shape: int) -> Float32:
            return np.zeros((dense_batch_size, *shape), np.float32)

        q_size = config.num_heads * config.head_dim
        self.hidden = rows(config.hidden_size)
        self.normed = rows(config.hidden_size)
        self.qkv = rows(config.qkv_size)
        self.q = rows(q_size)
        self.attn = rows(q_size)
        if config.num_experts:
            self.experts = np.zeros((dense_batch_size, config.experts_per_token), np.intp)  # "routing": which …
            self.shares = rows(config.experts_per_token)  # … and how much of each
            self.activated = rows(config.experts_per_token, config.intermediate_size)
        else:
            self.activated = rows(config.intermediate_size)


class LayerRunner:
    """Everything an operation works with besides the step: shapes, weights, cache, buffers."""

    def __init__(
        self, config: ModelConfig, weights: CpuWeights, cache: PagedCache, shape: TileShape, dense_batch_size: int
    ) -> None:
        self.config = config
        self.layers = weights.layers
        self.cache = cache
        self.shape = shape
        self.buffers = Activations(config, dense_batch_size)


OperationFunction = Callable[[LayerRunner, Step, int, int, int], None]
"""(runner, step, layer, start, stop)"""


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """x / √(mean x² + eps) · weight over the last axis."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    mean_square += np.float32(eps)
    result: Float32 = x / np.sqrt(mean_square)
    result *= weight
    return result


def _attn_norm(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    _norm(run, run.layers[layer].vectors["attn_norm"], start, stop)


def _ffn_norm(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    _norm(run, run.layers[layer].vectors["ffn_norm"], start, stop)


def _norm(run: LayerRunner, weight: Float32, start: int, stop: int) -> None:
    buffers = run.buffers
    buffers.normed[start:stop] = rms_norm(buffers.hidden[start:stop], weight, run.config.rms_norm_eps)


def _qkv_proj(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    weights, buffers = run.layers[layer], run.buffers
    qkv = buffers.qkv[start:stop]
    project(buffers.normed[start:stop], weights.projections["qkv_proj"], qkv)
    if "qkv_bias" in weights.vectors:
        qkv += weights.vectors["qkv_bias"]


def _rope_append(run: LayerRunner, step: Step, layer: int, start: int, stop: int) -> None:
    config, norms, buffers = run.config, run.layers[layer].vectors, run.buffers
    heads, kv_heads = config.num_heads, config.num_kv_heads
    qkv = buffers.qkv[start:stop].reshape(stop - start, heads + 2 * kv_heads, config.head_dim)
    q, k, v = np.split(qkv, (heads, heads + kv_heads), axis=1)
    if "q_norm" in norms:
        q = rms_norm(q, norms["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, norms["k_norm"], config.rms_norm_eps)
    cos, sin = step.cos[start:stop], step.sin[start:stop]
    rotate(q, cos, sin, buffers.q[start:stop].reshape(q.shape))
    keys = np.empty(k.shape, np.float32)
    rotate(k, cos, sin, keys)
    run.cache.append(layer, keys, v, step.pages[start:stop], step.offsets[start:stop])


def _attention(run: LayerRunner, step: Step, layer: int, start: int, stop: int) -> None:
    buffers, cache = run.buffers, run.cache
    for work in step.attention(start, stop):
        attend(run.shape, work, buffers.q, cache.keys[layer], cache.values[layer], buffers.attn)


def _o_proj(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    weights, buffers = run.layers[layer], run.buffers
    _add_projected(buffers.attn[start:stop], weights.projections["o_proj"], buffers.hidden[start:stop])
    if "o_bias" in weights.vectors:
        buffers.hidden[start:stop] += weights.vectors["o_bias"]


def _gate_up_proj(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    buffers = run.buffers
    _swiglu(buffers.normed[start:stop], run.layers[layer].projections["gate_up_proj"], buffers.activated[start:stop])


def _down_proj(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    buffers = run.buffers
    _add_projected(
        buffers.activated[start:stop], run.layers[layer].projections["down_proj"], buffers.hidden[start:stop]
    )


def _router(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    """Softmax over all experts; the most likely ones share the token in proportion. Ties go to the lower index."""
    buffers, count = run.buffers, run.config.experts_per_token
    logits = np.empty((stop - start, run.config.num_experts), np.float32)
    project(buffers.normed[start:stop], run.layers[layer].projections["router"], logits)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-shares, axis=-1, kind="stable")[:, :count]
    kept = np.take_along_axis(shares, chosen, axis=-1)
    buffers.experts[start:stop] = chosen
    buffers.shares[start:stop] = kept / kept.sum(axis=-1, keepdims=True)


def _moe_gate_up_proj(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    buffers, weights = run.buffers, run.layers[layer].experts["moe_gate_up_proj"]
    for expert, rows, choice in _by_expert(run, start, stop):
        result = np.empty((len(rows), run.config.intermediate_size), np.float32)
        _swiglu(buffers.normed[rows], weights[expert], result)
        buffers.activated[rows, choice] = result


def _moe_down_proj(run: LayerRunner, _step: Step, layer: int, start: int, stop: int) -> None:
    buffers, weights = run.buffers, run.layers[layer].experts["moe_down_proj"]
    parts = np.empty((stop - start, run.config.experts_per_token, run.config.hidden_size), np.float32)
    for expert, rows, choice in _by_expert(run, start, stop):
        result = np.empty((len(rows), run.config.hidden_size), np.float32)
        project(buffers.activated[rows, choice], weights[expert], result)
        parts[rows - start, choice] = result * buffers.shares[rows, choice, None]
    buffers.hidden[start:stop] += parts.sum(axis=1)  # in order of share, so independent of who else uses an expert


def _by_expert(run: LayerRunner, start: int, stop: int) -> list[tuple[int, NDArray[np.intp], NDArray[np.intp]]]:
    """(expert, rows that chose it, as their how-manieth choice) for each expert that was chosen."""
    experts = run.buffers.experts[start:stop]
    groups = []
    for expert in np.unique(experts):
        rows, choice = np.nonzero(experts == expert)
        groups.append((int(expert), rows + start, choice))
    return groups


def _swiglu(x: Float32, weight: Projection, out: Float32) -> None:
    """silu(x·gate) · (x·up) into ``out``; the outputs of ``weight`` are gate, then up."""
    inner = out.shape[1]
    gate_up = np.empty((len(x), 2 * inner), np.float32)
    project(x, weight, gate_up)
    gate, up = gate_up[:, :inner], gate_up[:, inner:]
    np.negative(gate, out=out)
    np.exp(out, out=out)
    out += np.float32(1)
    np.divide(gate, out, out=out)
    out *= up


def _add_projected(x: Float32, weight: Projection, residual: Float32) -> None:
    projected = np.empty(residual.shape, np.float32)
    project(x, weight, projected)
    residual += projected


OPERATIONS: Mapping[str, OperationFunction] = MappingProxyType(
    {
        "attn_norm": _attn_norm,
        "qkv_proj": _qkv_proj,
        "rope_append": _rope_append,
        "decode_attention": _attention,
        "prefill_attention": _attention,
        "o_proj": _o_proj,
        "ffn_norm": _ffn_norm,
        "gate_up_proj": _gate_up_proj,
        "down_proj": _down_proj,
        "router": _router,
        "moe_gate_up_proj": _moe_gate_up_proj,
        "moe_down_proj": _moe_down_proj,
    }
)
