"""What bounds serving a model on a machine, and how fast it can be: NanoFlow's cost model (arXiv 2408.12757).

Equations 1 to 5 over the sums of a tensor parallel group, the same resources operation by operation, and what the paper
has not: a bound from power. Imports no CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from nf.config import ModelConfig
from nf.errors import InputError
from nf.models.declaration import Model
from nf.models.operations import Resource
from nf.planning.hardware import Accelerator, Power
from nf.planning.operation_costs import (
    VALUE_BYTES,
    Counting,
    OperationCost,
    Workload,
    kv_bytes_per_token,
    operation_costs,
    parameters,
)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine's GPUs do together: FLOP/s, bytes/s, and bytes/s sent."""

    compute: float
    memory_bandwidth: float
    network_bandwidth: float

    def times(self, cost: OperationCost) -> tuple[float, float, float]:
        """Seconds that compute, memory and network need, each for itself."""
        network = cost.network_bytes / self.network_bandwidth if cost.network_bytes else 0.0
        return cost.flops / self.compute, cost.memory_bytes / self.memory_bandwidth, network


@dataclass(frozen=True, slots=True)
class Machine:
    """A tensor parallel group of one host."""

    accelerator: Accelerator
    gpus: int = 1

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.gpus * self.accelerator.memory

    @property
    def rates(self) -> Rates:
        """By the data sheet."""
        a, n = self.accelerator, self.gpus
        return Rates(n * a.compute, n * a.memory_bandwidth, n * (a.network_bandwidth or 0.0))

    @property
    def measured_rates(self) -> Rates:
        """As measured, and by the data sheet where nothing was."""
        sheet, m, n = self.rates, self.accelerator.measured, self.gpus
        return Rates(
            n * m.compute if m.compute else sheet.compute,
            n * m.memory_bandwidth if m.memory_bandwidth else sheet.memory_bandwidth,
            n * m.network_bandwidth if m.network_bandwidth else sheet.network_bandwidth,
        )


def memory_time(machine: Machine) -> float:
    """Eq. 1: seconds of a step whose batch fills the memory and reads all of it once."""
    return machine.memory / machine.rates.memory_bandwidth


def compute_time(machine: Machine, active_parameters: float, dense_batch: float) -> float:
    """Eq. 2: seconds of a step's GEMMs."""
    return 2 * dense_batch * active_parameters / machine.rates.compute


def network_time(machine: Machine, config: ModelConfig, dense_batch: float) -> float:
    """Eq. 3: seconds of a step's collectives; 0 on one GPU."""
    if machine.gpus == 1:
        return 0.0
    sent = 4 * (machine.gpus - 1) * dense_batch * config.hidden_size * VALUE_BYTES * config.num_layers
    return sent / machine.rates.network_bandwidth


def optimal_throughput(compute: float, active_parameters: float) -> float:
    """Eq. 5: tokens per second, in and out, of GPUs that do nothing but the model's GEMMs at ``compute`` FLOP/s."""
    return compute / (2 * active_parameters)


def max_requests(machine: Machine, model: Model, workload: Workload) -> float:
    """Requests whose KV fits beside the weights, each half way through its output on average; negative if the weights
    alone do not fit."""
    free = machine.memory - VALUE_BYTES * parameters(model)
    return free / resident_bytes(machine, model.config, workload)


def resident_bytes(machine: Machine, config: ModelConfig, workload: Workload) -> float:
    """KV of one decoding request, mean over its life; what a sliding window has left behind counts as given back."""
    return workload.decode_context(config.sliding_window) * kv_bytes_per_token(config, machine.gpus)


@dataclass(frozen=True)
class Estimate:
    """Everything the cost model says about a model on a machine under a workload; times in seconds.

    Args:
        dense_batch: tokens of a step; at most ``max_dense_batch``.
    """

    model: Model
    machine: Machine
    workload: Workload
    counting: Counting
    dense_batch: float
    max_requests: float  # that decode at the same time, by memory

    @property
    def max_dense_batch(self) -> float:
        """B_dense of a full memory: each request decodes one token per step, and prefill keeps the balance."""
        return self.max_requests / self.workload.decode_share

    @cached_property
    def parameters(self) -> int:
        return parameters(self.model)

    @cached_property
    def active_parameters(self) -> int:
        return parameters(self.model, active=True)

    @property
    def requests(self) -> float:
        """Decoding at the same time in a step of ``dense_batch`` tokens."""
        return self.dense_batch * self.workload.decode_share

    @property
    def memory_time(self) -> float:
        """Eq. 1; the largest batch fills the memory, a smaller one reads weights and its own requests' KV."""
        kv = self.requests * resident_bytes(self.machine, self.model.config, self.workload)
        used = VALUE_BYTES * self.parameters + kv
        return memory_time(self.machine) * min(1.0, used / self.machine.memory)

    @property
    def compute_time(self) -> float:
        """Eq. 2."""
        return compute_time(self.machine, self.active_parameters, self.dense_batch)

    @property
    def network_time(self) -> float:
        """Eq. 3."""
        return network_time(self.machine, self.model.config, self.dense_batch)

    @property
    def memory_ratio(self) -> float:
        """T_R of Eq. 4: above 1 the workload is memory-bound."""
        return self.memory_time / self.compute_time

    @property
    def network_ratio(self) -> float:
        """T_net / T_comp: above 1 the workload is network-bound."""
        return self.network_time / self.compute_time

    @property
    def bound(self) -> Resource:
        """The resource that Eq. 1 to 3 say is the scarcest."""
        return bound((self.compute_time, self.memory_time, self.network_time))

    @property
    def compute_bound_batch(self) -> int:
        """Tokens from which the GEMMs' arithmetic takes longer than reading their weights."""
        rates, share = self.machine.rates, self.parameters / self.active_parameters
        return math.ceil(VALUE_BYTES * share * rates.compute / (2 * rates.memory_bandwidth))

    @cached_property
    def operations(self) -> tuple[OperationCost, ...]:
        """Of one step."""
        return operation_costs(self.model, self.workload, self.dense_batch, self.machine.gpus, self.counting)

    @property
    def total(self) -> OperationCost:
        """The sum of the operations."""
        operations = self.operations
        return OperationCost(
            "total",
            sum(cost.flops for cost in operations),
            sum(cost.memory_bytes for cost in operations),
            sum(cost.network_bytes for cost in operations),
        )

    def throughput(self, step_time: float) -> float:
        """Tokens per second and GPU, in and out, of steps that take so long."""
        return self.dense_batch / step_time / self.machine.gpus

    def sequential_time(self, rates: Rates) -> float:
        """Operations one after the other, each as fast as its scarcest resource allows."""
        return sum(max(rates.times(cost)) for cost in self.operations)

    def overlapped_time(self, rates: Rates) -> float:
        """All operations' resources used side by side without loss: the step takes its scarcest resource's time."""
        return max(rates.times(self.total))

    def power_time(self) -> float | None:
        """What the power cap allows if everything overlaps without loss; None where the energy was not measured.

        An operation takes its scarcer resource's joules: a GEMM's cost per FLOP holds its memory traffic, and decode
        attention's per byte its arithmetic. The static share is in both and drawn only once, so it is taken out of
        both, and the step lasts as long as the rest takes at what the cap leaves above the static power.
        """
        power = self.machine.accelerator.measured.power
        if power is None:
            return None
        joules = dynamic_joules(self.operations, self.machine, power)
        return joules / (self.machine.gpus * (power.cap_watts - power.static_watts))


def dynamic_joules(operations: Iterable[OperationCost], machine: Machine, power: Power) -> float:
    """Energy of operations beside what idle GPUs draw; that of the network was not measured and is left out."""
    rates, static = machine.measured_rates, machine.gpus * power.static_watts
    per_flop = power.joules_per_flop - static / rates.compute
    per_byte = power.joules_per_byte - static / rates.memory_bandwidth
    return sum(max(cost.flops * per_flop, cost.memory_bytes * per_byte) for cost in operations)


def bound(times: tuple[float, float, float]) -> Resource:
    """The resource of the longest of (compute, memory, network)."""
    return max(zip(times, Resource, strict=True), key=lambda pair: pair[0])[1]


def estimate(
    model: Model,
    machine: Machine,
    workload: Workload,
    *,
    dense_batch: int | None = None,
    counting: Counting = Counting.ENGINE,
) -> Estimate:
    """What the model costs on the machine.

    Args:
        dense_batch: tokens of a step; None takes the largest that memory allows.

    Raises:
        InputError: an option that cannot be, named as on the command line: the group's size does not divide the heads,
            the weights or one request do not fit, the network is not known, or the batch is too large.
    """
    _check(model.config, machine, workload)
    requests = max_requests(machine, model, workload)
    if requests < 1:
        weights, resident = VALUE_BYTES * parameters(model), resident_bytes(machine, model.config, workload)
        raise InputError(
            "--tp",
            f"{weights / 1e9:,.1f} GB of weights and {resident / 1e9:,.2g} GB of one request's KV do not fit into the "
            f"{machine.memory / 1e9:,.0f} GB of {machine.gpus} × {machine.accelerator.label}; take more or larger GPUs",
        )
    largest = math.floor(requests / workload.decode_share)
    if dense_batch is not None and not 1 <= dense_batch <= largest:
        raise InputError(
            "--dense-batch-size",
            f"must be 1 to {largest}, where the requests' KV fills the memory, not {dense_batch}",
        )
    return Estimate(model, machine, workload, counting, dense_batch or largest, requests)


def _check(config: ModelConfig, machine: Machine, workload: Workload) -> None:
    gpus = machine.gpus
    sizes = [n for n in range(1, config.num_heads + 1) if _splits(n, config)]
    if gpus not in sizes:
        raise InputError("--tp", f"must be one of {', '.join(map(str, sizes))}, which split the heads, not {gpus}")
    if gpus > 1 and machine.accelerator.network_bandwidth is None:
        raise InputError("--tp", f"must be 1 on {machine.accelerator.label}, whose network bandwidth is not known")
    for option, length in (("--input-len", workload.input_len), ("--output-len", workload.output_len)):
        if not length >= 1:
            raise InputError(option, f"must be at least 1, not {length:g}")
    if workload.input_len + workload.output_len > config.max_position_embeddings:
        raise InputError(
            "--input-len",
            f"{workload.input_len:g} and --output-len {workload.output_len:g} are more than the model's "
            f"{config.max_position_embeddings} positions",
        )


def _splits(gpus: int, config: ModelConfig) -> bool:
    """Whether so many GPUs get equal shares of the heads, and whole KV heads or equally many copies of one."""
    high, low = max(gpus, config.num_kv_heads), min(gpus, config.num_kv_heads)
    return config.num_heads % gpus == 0 and high % low == 0
