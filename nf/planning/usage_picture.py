"""Resource use of a steady step over time (Fig. 10 of NanoFlow), from the spans of a traced step.

A nano-operation's FLOPs and bytes are spread evenly over the time it ran, so a bar is what was achieved over what the
accelerator has, not what a counter of the hardware said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.bench.steady_step import Load
from nf.executors.trace import Span
from nf.models.declaration import Model
from nf.planning.hardware import Accelerator
from nf.planning.loads import batch_shape
from nf.planning.operation_costs import Workload, operation_costs
from nf.planning.svg import GREY, RESOURCE_COLOURS, document, line, text

SHOWN_LAYERS = 3
_BINS = 360
_WIDTH, _LEFT, _TOP, _ROW, _GAP = 1100, 64, 72, 130, 70  # pixels
_NAME = re.compile(r"(?P<operation>\w+) \[(?P<start>\d+), (?P<stop>\d+)\) layer (?P<layer>\d+)")

Usage = Mapping[str, NDArray[np.float64]]
"""Resource → share of what the accelerator has, per bin."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A step under one plan: how some of its layers use the GPU, how many, and for how many microseconds."""

    label: str
    usage: Usage
    layers: int
    micros: float


def traced(label: str, spans: Sequence[Span], model: Model, load: Load, accelerator: Accelerator) -> Traced:
    """Resource use from the first nano-operation of a layer in the middle of the step to that of SHOWN_LAYERS on, or to
    the end where so many do not follow."""
    operations = {operation.name: operation for operation in model.operations}
    shape = batch_shape(load)
    workload = Workload(load.input_len, load.output_len)
    totals = {cost.name: cost for cost in operation_costs(model, workload, load.dense_batch_size)}
    layers = model.config.num_layers
    first = max(0, (layers - SHOWN_LAYERS) // 2)
    parsed = [(match, span) for span in spans if (match := _NAME.fullmatch(span.name)) is not None]
    begins = [span.start_us for match, span in parsed if int(match["layer"]) == first]
    if not begins:
        return Traced(label, {"compute": np.zeros(_BINS), "memory": np.zeros(_BINS)}, 0, 0.0)
    begin = min(begins)
    ends = [span.start_us for match, span in parsed if int(match["layer"]) == first + SHOWN_LAYERS]
    micros = min(ends, default=max(span.start_us + span.duration_us for _, span in parsed)) - begin
    # What runs in that time counts, whichever layer it is of.
    compute, memory = np.zeros(_BINS), np.zeros(_BINS)
    for match, span in parsed:
        operation = operations[match["operation"]]
        whole = shape.rows(operation, 0, shape.tokens)
        if not whole or span.duration_us <= 0:
            continue
        part = shape.rows(operation, int(match["start"]), int(match["stop"])) / whole / layers
        cost, seconds = totals[operation.name], span.duration_us * 1e-6
        covered = _covered(span.start_us - begin, span.duration_us, micros)
        compute += covered * (part * cost.flops / seconds / accelerator.compute)
        memory += covered * (part * cost.memory_bytes / seconds / accelerator.memory_bandwidth)
    return Traced(label, {"compute": compute, "memory": memory}, min(SHOWN_LAYERS, layers - first), micros)


def _covered(start: float, duration: float, micros: float) -> NDArray[np.float64]:
    """Share of each bin that lies in [start, start + duration)."""
    edges = np.linspace(0, micros, _BINS + 1)
    overlap = np.minimum(edges[1:], start + duration) - np.maximum(edges[:-1], start)
    return np.asarray(np.maximum(overlap, 0) / (micros / _BINS), np.float64)


def usage_picture(steps: Sequence[Traced], title: str) -> str:
    """The steps below one another on one scale of time, as SVG."""
    longest = max((step.micros for step in steps), default=0.0) or 1.0
    parts = [text(10, 24, title, anchor="start", size=15)]
    for place, name in enumerate(("compute", "memory")):
        parts.append(text(_LEFT + _WIDTH - 80 * place, 24, name, anchor="end", size=13, fill=RESOURCE_COLOURS[name]))
    for row, step in enumerate(steps):
        parts += _panel(_TOP + row * (_ROW + _GAP), step, longest)
    return document(_LEFT + _WIDTH + 20, _TOP + len(steps) * (_ROW + _GAP), parts)


def _panel(top: float, step: Traced, longest: float) -> list[str]:
    width = _WIDTH * step.micros / longest
    parts = [line([(_LEFT, top), (_LEFT, top + _ROW), (_LEFT + _WIDTH, top + _ROW)], GREY)]
    parts += [text(_LEFT - 8, top + _ROW * (1 - y) + 4, f"{y:.0%}", anchor="end", size=11) for y in (0, 0.5, 1)]
    means = ", ".join(f"{name} {values.mean():.0%}" for name, values in step.usage.items())
    label = f"{step.label}: {step.micros:,.0f} µs for {step.layers} layers; on average {means}"
    parts.append(text(_LEFT, top + _ROW + 18, label, anchor="start"))
    for name, values in step.usage.items():
        places = [(_LEFT + width * (i + 0.5) / _BINS, top + _ROW * (1 - min(1.2, v))) for i, v in enumerate(values)]
        parts.append(line(places, RESOURCE_COLOURS[name]))
    return parts
