"""Figures 2 and 3 of NanoFlow: which resource bounds which model, as values and as the paper prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nf.models.declaration import Model
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning.cost_model import Machine, compute_time, max_requests, memory_time, network_time
from nf.planning.hardware import ACCELERATORS, Accelerator
from nf.planning.operation_costs import Workload, parameters

WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "LMSYS-Chat": Workload(102, 222),
        "Splitwise": Workload(1155, 211),
        "ShareGPT": Workload(246, 322),
        "512-512": Workload(512, 512),
        "1024-512": Workload(1024, 512),
        "512-1024": Workload(512, 1024),
    }
)
"""Mean tokens in and out (Table 4), in the order of Fig. 3."""

NETWORK_PRINTED: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "llama-3-8b": (0.382, 0.477, 0.477, 1.008, 1.008, 0.918, 1.147, 0.415, 1.171, 1.171, 1.529, 1.376, 2.609),
        "mixtral-8x7b": (0.243, 0.303, 0.303, 0.640, 0.640, 0.583, 0.728, 0.264, 0.744, 0.744, 0.971, 0.874, 1.657),
        "llama-2-70b": (0.218, 0.273, 0.273, 0.576, 0.576, 0.524, 0.655, 0.237, 0.669, 0.669, 0.874, 0.786, 1.491),
        "llama-3-70b": (0.218, 0.273, 0.273, 0.576, 0.576, 0.524, 0.655, 0.237, 0.669, 0.669, 0.874, 0.786, 1.491),
        "qwen2-72b": (0.212, 0.265, 0.265, 0.560, 0.560, 0.510, 0.637, 0.231, 0.651, 0.651, 0.850, 0.765, 1.450),
        "llama-3.1-405b": (0.119, 0.148, 0.148, 0.314, 0.314, 0.285, 0.357, 0.129, 0.364, 0.364, 0.476, 0.428, 0.812),
    }
)
"""Fig. 2: T_net / T_comp on eight GPUs, by model and accelerator in the order of ``ACCELERATORS``."""

MEMORY_PRINTED: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "llama-3-8b": (0.23, 0.31, 0.37, 0.61, 0.68, 1.09),
        "mixtral-8x7b": (0.12, 0.17, 0.20, 0.32, 0.36, 0.58),
        "llama-2-70b": (0.07, 0.09, 0.11, 0.18, 0.20, 0.32),
        "llama-3-70b": (0.07, 0.09, 0.11, 0.18, 0.20, 0.32),
        "qwen2-72b": (0.07, 0.09, 0.11, 0.18, 0.20, 0.31),
    }
)
"""Fig. 3: T_mem / T_comp on A100s of 80 GB, by model and workload in the order of ``WORKLOADS``."""

NETWORK_GPUS = 8
MEMORY_GPUS: Mapping[str, int] = MappingProxyType({name: 1 if name == "llama-3-8b" else 8 for name in MEMORY_PRINTED})
MEMORY_ACCELERATOR = "a100-80gb"
_NOT_PRINTED = (None,) * len(WORKLOADS)


@dataclass(frozen=True, slots=True)
class Figure:
    """A table of ratios; above 1 the resource named is scarcer than compute.

    Args:
        values: [rows][columns]; None where the model does not fit.
        printed: the paper's values where it has them, [rows][columns].
    """

    title: str
    resource: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    printed: tuple[tuple[float | None, ...], ...]


def network_figure(model: tuple[str, Model] | None = None) -> Figure:
    """Fig. 2: T_net / T_comp of eight GPUs, for the paper's models and one more, on every accelerator."""
    models = {name: declare(shape(name)) for name in NETWORK_PRINTED}
    if model is not None and model[1] not in models.values():
        models[model[0]] = model[1]
    machines = [Machine(accelerator, NETWORK_GPUS) for accelerator in ACCELERATORS.values()]
    return Figure(
        title=f"Network time over compute time on {NETWORK_GPUS} GPUs",
        resource="network",
        rows=tuple(models),
        columns=tuple(machine.accelerator.label for machine in machines),
        values=tuple(tuple(network_ratio(machine, model) for machine in machines) for model in models.values()),
        printed=tuple(NETWORK_PRINTED.get(name, (None,) * len(machines)) for name in models),
    )


def memory_figure(accelerator: Accelerator, model: tuple[str, Model, int] | None = None) -> Figure:
    """Fig. 3: T_mem / T_comp of a full memory, for the paper's models and one more on so many GPUs, by workload."""
    shown = [(name, declare(shape(name)), gpus) for name, gpus in MEMORY_GPUS.items()]
    printed = MEMORY_PRINTED if accelerator.name == MEMORY_ACCELERATOR else {}
    values = [printed.get(name, _NOT_PRINTED) for name, _, _ in shown]
    if model is not None and model[1:] not in [paper[1:] for paper in shown]:
        shown.append(model)
        values.append(_NOT_PRINTED)
    return Figure(
        title=f"Memory time over compute time on {accelerator.label}",
        resource="memory",
        rows=tuple(f"{name}, {gpus} GPU{'s' * (gpus > 1)}" for name, _, gpus in shown),
        columns=tuple(WORKLOADS),
        values=tuple(
            tuple(memory_ratio(Machine(accelerator, gpus), model, workload) for workload in WORKLOADS.values())
            for _, model, gpus in shown
        ),
        printed=tuple(values),
    )


def network_ratio(machine: Machine, model: Model) -> float:
    """T_net / T_comp, which no batch size changes."""
    return network_time(machine, model.config, 1) / compute_time(machine, parameters(model, active=True), 1)


def memory_ratio(machine: Machine, model: Model, workload: Workload) -> float | None:
    """T_R of Eq. 4 for the batch that fills the memory; None where the weights or one request do not fit."""
    requests = max_requests(machine, model, workload)
    if requests < 1:
        return None
    batch = requests / workload.decode_share
    return memory_time(machine) / compute_time(machine, parameters(model, active=True), batch)
