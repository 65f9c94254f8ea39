"""A pipeline plan as a timeline: a row per stream, a box per nano-operation.

The boxes are placed as the plan would run if every nano-operation took what it takes alone on its SMs: what overlapping
costs is not in the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nf.graphs.plan import LayerStep, PipelinePlan, unroll
from nf.models.operations import Operation
from nf.planning.nano_layer import BatchShape, profiled_costs
from nf.planning.profile import Profile
from nf.planning.svg import GREY, RESOURCE_COLOURS, box, document, line, text

SecondsOf = Callable[[LayerStep], float]

_WIDTH, _LEFT, _TOP, _ROW, _FOOT = 1200, 120, 56, 94, 40  # pixels
_NARROW = 13  # pixels, of a box that a name fits into lengthwise
_LETTER = 6.2  # pixels of a character at size 11


def unit_lengths(_step: LayerStep) -> float:
    """Where nothing was measured every nano-operation is as long as any other."""
    return 1.0


def profiled_lengths(profile: Profile, plan: PipelinePlan, batch: BatchShape) -> SecondsOf:
    """Lengths from a profile.

    Raises:
        InputError: an operation was not measured.
    """
    cost_of = profiled_costs(profile, batch)

    def seconds(step: LayerStep) -> float:
        rows = batch.rows(step.operation, step.start, step.stop)
        return cost_of(step.operation, rows, plan.streams[step.stream].sms).seconds

    return seconds


def schedule(steps: Sequence[LayerStep], seconds_of: SecondsOf) -> list[tuple[float, float]]:
    """(start, end) of every step if each starts as soon as its stream and what it depends on let it."""
    free: dict[int, float] = {}
    times: list[tuple[float, float]] = []
    for step in steps:
        start = max([free.get(step.stream, 0.0), *(times[other][1] for other in step.depends_on)])
        times.append((start, start + seconds_of(step)))
        free[step.stream] = times[-1][1]
    return times


def plan_picture(
    plan: PipelinePlan,
    operations: Sequence[Operation],
    seconds_of: SecondsOf = unit_lengths,
    num_layers: int | None = None,
) -> str:
    """The plan as SVG over ``num_layers`` layers; None takes as many as show a steady round."""
    layers = num_layers or 2 * plan.max_lag + 2
    steps = unroll(plan, operations, layers)
    times = schedule(steps, seconds_of)
    end = max(stop for _, stop in times)
    scale = (_WIDTH - _LEFT - 20) / end
    measured = seconds_of is not unit_lengths
    title = f"Plan {plan.name}: {plan.dense_batch_size} tokens, {layers} layers"
    parts = [text(10, 24, title, anchor="start", size=15)]
    for row, stream in enumerate(plan.streams):
        y = _TOP + row * _ROW
        sms = "all SMs" if stream.sms == "all" else f"{stream.sms} SMs"
        parts.append(text(10, y + 20, stream.name, anchor="start"))
        parts.append(text(10, y + 36, sms, anchor="start", size=11, fill=GREY))
    for step, (start, stop) in zip(steps, times, strict=True):
        if stop > start:
            x, y = _LEFT + start * scale, _TOP + step.stream * _ROW
            parts += _nano_operation(step, x, y, (stop - start) * scale, (stop - start) if measured else None)
    return document(_WIDTH, _TOP + _ROW * len(plan.streams) + _FOOT, [*parts, *_axis(end, scale, plan, measured)])


def _nano_operation(step: LayerStep, x: float, y: float, width: float, seconds: float | None) -> list[str]:
    name, tokens = step.operation.name, f"[{step.start}, {step.stop})"
    took = f", {seconds * 1e6:.1f} µs" if seconds is not None else ""
    colour = RESOURCE_COLOURS[str(step.operation.resource)]
    # Layers alternate in strength, so that they can be told apart.
    opacity = 0.9 if step.layer % 2 == 0 else 0.55
    title = f"{name} {tokens} layer {step.layer}{took}"
    parts = [box(x, y, max(width - 1, 0.5), _ROW - 14, colour, title=title, opacity=opacity)]
    if len(name) * _LETTER < width:
        for line_, words in enumerate((name, tokens, f"layer {step.layer}")):
            if len(words) * _LETTER < width:
                parts.append(text(x + width / 2, y + 20 + 15 * line_, words, size=11))
    elif width > _NARROW:
        parts.append(text(x + width / 2 + 3, y + (_ROW - 14) / 2, name, size=10, turn=-90))
    return parts


def _axis(end: float, scale: float, plan: PipelinePlan, measured: bool) -> list[str]:
    y = _TOP + _ROW * len(plan.streams)
    parts = [line([(_LEFT, y), (_LEFT + end * scale, y)], GREY)]
    if not measured:
        return [*parts, text(_LEFT, y + 18, "Order only: every nano-operation is drawn equally long.", anchor="start")]
    for tick in range(6):
        at = end * tick / 5
        anchor = "end" if tick == 5 else "middle"
        parts.append(text(_LEFT + at * scale, y + 16, f"{at * 1e3:.2f} ms", size=11, anchor=anchor))
    return parts
