"""FLOPs, memory traffic and network traffic of every operation of a step (NanoFlow, Table 2).

A step computes one dense batch through all layers. Everything here is the sum over all layers and all GPUs of a tensor
parallel group, and a mean over a workload in balance: as many requests end as begin, so that of B tokens
B·d/(p + d) are decode tokens (p tokens in, d out per request) and the rest prefill.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from nf.config import ModelConfig
from nf.models.buffers import row_widths
from nf.models.declaration import Model
from nf.models.operations import Operation, Rows

VALUE_BYTES = 2  # weights, activations and KV are 16 bits wide
REPLICATED = frozenset({"hidden", "normed", "routing"})
"""Buffers of which every GPU of a tensor parallel group holds whole rows; the others are split among them."""


class Counting(StrEnum):
    """What is counted.

    ENGINE: what this engine's kernels do. SwiGLU and the residual are epilogues (the residual is read, [tokens, 2I] is
    never written), masked prefill attention is skipped, every GPU reads its copy of a replicated buffer, and norms,
    rope_append and lm_head are there.

    PAPER: what NanoFlow's Table 2 counts. GEMMs read one input and write one output, [tokens, 2I] included; prefill
    attention computes the whole p × p square; a buffer counts once however many GPUs hold it; GEMMs, attention and
    collectives alone.
    """

    ENGINE = "engine"
    PAPER = "paper"


@dataclass(frozen=True, slots=True)
class Workload:
    """Mean tokens of a request, in and out. Both may be fractions: they are means."""

    input_len: float
    output_len: float

    @property
    def decode_share(self) -> float:
        """Decode tokens among all tokens."""
        return self.output_len / (self.input_len + self.output_len)

    def decode_context(self, window: int | None = None) -> float:
        """Mean tokens that a decode token attends to; p + d/2 where no sliding window cuts it."""
        return _mean_capped(self.input_len, self.input_len + self.output_len, window)

    def prefill_context(self, window: int | None = None) -> float:
        """Mean tokens that a prefill token attends to under the causal mask; p/2 without a sliding window."""
        return _mean_capped(0.0, self.input_len, window)


@dataclass(frozen=True, slots=True)
class OperationCost:
    """One operation of a step, all layers and GPUs together."""

    name: str
    flops: float
    memory_bytes: float
    network_bytes: float = 0.0


def operation_costs(
    model: Model, workload: Workload, dense_batch: float, gpus: int = 1, counting: Counting = Counting.ENGINE
) -> tuple[OperationCost, ...]:
    """The operations of a step in the order a layer runs them, then the collectives, then what follows the layers.

    Args:
        dense_batch: tokens of the step.
        gpus: of the tensor parallel group; every layer has two all-reduces, after o_proj and after the last
            projection of the feed-forward part.
    """
    return tuple(_Step(model, workload, dense_batch, gpus, counting).costs())


def parameters(model: Model, *, active: bool = False) -> int:
    """Parameters of the model; ``active`` counts of its experts those that one token meets."""
    config = model.config
    share = config.experts_per_token / config.num_experts if active and config.num_experts else 1.0
    layer = sum(math.prod(w.shape) * (share if len(w.shape) == 3 else 1.0) for w in model.layer_weights)
    ends = [model.embed, model.final_norm, *([] if config.tie_word_embeddings else [model.lm_head])]
    return round(sum(math.prod(weight.shape) for weight in ends) + config.num_layers * layer)


def kv_bytes_per_token(config: ModelConfig, gpus: int = 1) -> float:
    """Keys and values of one token in all layers, on all GPUs; more GPUs than KV heads hold copies."""
    copies = max(1.0, gpus / config.num_kv_heads)
    return row_widths(config)["kv"] * VALUE_BYTES * config.num_layers * copies


class _Step:
    """One step's quantities, and what each operation makes of them."""

    def __init__(self, model: Model, workload: Workload, dense_batch: float, gpus: int, counting: Counting) -> None:
        self.model, self.workload, self.gpus = model, workload, gpus
        self.as_paper = counting is Counting.PAPER
        self.config = config = model.config
        decode = dense_batch * workload.decode_share
        self.rows = {Rows.ALL: dense_batch, Rows.DECODE: decode, Rows.PREFILL: dense_batch - decode}
        self.weights = {weight.name: weight.shape for weight in model.layer_weights}
        row = {name: width * VALUE_BYTES * config.num_layers for name, width in row_widths(config).items()}
        self.row_bytes: dict[str, float] = row | {"kv": kv_bytes_per_token(config, gpus)}
        if not self.as_paper:
            self.row_bytes |= {name: gpus * row[name] for name in REPLICATED}

    def costs(self) -> Iterator[OperationCost]:
        for operation in self.model.operations:
            attention = operation.rows is not Rows.ALL
            matrix = any(len(self.weights[name]) > 1 for name in operation.weights)
            if attention:
                yield self._attention(operation)
            elif matrix or not self.as_paper:
                yield self._projection(operation)
        if self.gpus > 1:
            yield self._all_reduces()
        if not self.as_paper:
            yield self._lm_head()

    def _projection(self, operation: Operation) -> OperationCost:
        """A GEMM, or an elementwise operation, whose arithmetic is not counted."""
        config, rows = self.config, self.rows[operation.rows]
        flops = weight_values = 0.0
        for name in operation.weights:
            shape = self.weights[name]
            met = used = 1.0
            if len(shape) == 3:  # experts: a token meets some, and a batch uses all that one of its tokens meets
                met = config.experts_per_token / config.num_experts
                used = 1 - (1 - met) ** rows
            if len(shape) > 1:
                flops += 2 * rows * met * math.prod(shape)
            weight_values += used * math.prod(shape)
        memory = weight_values * VALUE_BYTES * config.num_layers + rows * self._row_traffic(operation)
        return OperationCost(operation.name, flops * config.num_layers, memory)

    def _row_traffic(self, operation: Operation) -> float:
        """Bytes per row that the operation reads and writes."""
        reads, writes = operation.reads, operation.writes
        if self.as_paper:
            reads = tuple(name for name in reads if name not in writes and name != "routing")  # no residual
            writes = tuple(name for name in writes for _ in range(2 if name == "activated" else 1))  # gate and up
        return sum(self.row_bytes[name] for name in (*reads, *writes))

    def _attention(self, operation: Operation) -> OperationCost:
        """2 products of each query head with ``context`` keys or values. Decode reads all of its context, a prompt
        shares one reading of its own."""
        config, workload, rows = self.config, self.workload, self.rows[operation.rows]
        if operation.rows is Rows.DECODE:
            context = read = workload.decode_context(config.sliding_window)
        else:
            context = workload.input_len if self.as_paper else workload.prefill_context(config.sliding_window)
            read = 1.0
        flops = 4 * rows * context * config.num_heads * config.head_dim * config.num_layers
        memory = rows * (self.row_bytes["q"] + self.row_bytes["attn"] + read * self.row_bytes["kv"])
        return OperationCost(operation.name, flops, memory)

    def _all_reduces(self) -> OperationCost:
        """Two per layer (Eq. 3): each value is sent N − 1 times to be added and N − 1 times to be known."""
        values = (self.gpus - 1) * self.rows[Rows.ALL] * self.config.hidden_size * self.config.num_layers
        traffic = 4 * values * VALUE_BYTES
        return OperationCost("all_reduce", 2 * values, traffic, traffic)

    def _lm_head(self) -> OperationCost:
        """One row of logits per token out, as many as there are decode tokens."""
        config, rows = self.config, self.rows[Rows.DECODE]
        values = config.vocab_size * config.hidden_size
        width = config.vocab_size + self.gpus * config.hidden_size
        return OperationCost("lm_head", 2 * rows * values, (values + rows * width) * VALUE_BYTES)


def _mean_capped(low: float, high: float, cap: int | None) -> float:
    """Mean of min(x, cap) for x even in [low, high]."""
    if cap is None or high <= cap:
        return (low + high) / 2
    if low >= cap:
        return float(cap)
    return ((low + cap) / 2 * (cap - low) + cap * (high - cap)) / (high - low)
