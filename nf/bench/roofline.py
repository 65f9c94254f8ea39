"""What a run could reach at most: Eq. 5, which counts operations, and the power roofline, which counts joules.

Eq. 5 (NanoFlow, arXiv 2408.12757, section 3): every token takes 2·P operations, P the active parameters, so

    tokens/s ≤ Compute / 2P

A GPU at its power cap gives only as many tokens as its watts pay for:

    tokens/s ≤ watts · tokens / (operations · J per operation + bytes of KV read · J per byte)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nf.bench.workload import Workload
from nf.models.declaration import Model, Weight

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured on one GPU, or the sum of several.

    Args:
        flops: floating-point operations per second of the model's matrix products.
        joules_per_flop, joules_per_byte: of those products, and of reading HBM, each with the idle power in it.
        read_rate: bytes per second of reading HBM.
        watts: power cap.
    """

    flops: float
    joules_per_flop: float
    read_rate: float
    joules_per_byte: float
    watts: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a workload must do, whoever does it.

    Args:
        tokens: in and out.
        flops: of the matrix products and of attention over prompts.
        kv_bytes: keys and values that decode attention reads.
    """

    tokens: int
    flops: float
    kv_bytes: float


def active_parameters(model: Model) -> int:
    """Weights that take part in one token: of experts, those chosen. The embedding counts, once if tied."""
    ends = {(weight.parts, weight.shape) for weight in (model.embed, model.final_norm, model.lm_head)}
    return sum(math.prod(shape) for _, shape in ends) + _layers(model, model.layer_weights)


def eq5(flops: float, model: Model) -> float:
    """Most tokens per second, in and out, at ``flops`` operations per second."""
    return flops / (2 * active_parameters(model))


def work(model: Model, workload: Workload, value_bytes: int = 2) -> Work:
    """Of all requests: a prompt of p tokens and an output of o are p + o - 1 rows, of which o are sampled.

    Args:
        value_bytes: of a key's or value's element.
    """
    config = model.config
    p, o = workload.input_lens.astype(np.float64), workload.output_lens.astype(np.float64)
    matrices = [weight for weight in model.layer_weights if len(weight.shape) > 1]
    products = 2 * _layers(model, matrices) * (p + o - 1).sum() + 2 * math.prod(model.lm_head.shape) * o.sum()
    pairs = (p * (p + 1) / 2).sum()  # (token, key) pairs in prompts
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    keys_read = ((o - 1) * p + o * (o - 1) / 2).sum()  # output token t < o reads p + t keys
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * value_bytes * keys_read
    return Work(workload.input_tokens + workload.output_tokens, float(products + attention), float(kv_bytes))


def power_roofline(ceilings: Ceilings, work: Work) -> float:
    """Most tokens per second, in and out, that the power cap pays for."""
    joules = work.flops * ceilings.joules_per_flop + work.kv_bytes * ceilings.joules_per_byte
    return ceilings.watts * work.tokens / joules


def _layers(model: Model, weights: Iterable[Weight]) -> int:
    """Active parameters of these weights in all layers."""
    return model.config.num_layers * sum(map(math.prod, (active_shape(model, weight) for weight in weights)))


def active_shape(model: Model, weight: Weight) -> tuple[int, ...]:
    """An expert weight [num_experts, out, in] counts for the experts a token chooses."""
    if len(weight.shape) == 3:
        return (model.config.experts_per_token, *weight.shape[1:])
    return weight.shape
