"""Pictures of plans, curves and resource use: well-formed SVG that shows what it should, where it should."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from fake_profile import MODEL, FormulaBench, formula_profile
from plan_cases import LLAMA, MIXTRAL

from nf.bench.steady_step import Load
from nf.executors.trace import Span
from nf.graphs.plan import PipelinePlan, nano_batch_plan, sequential_plan, unroll
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning.curve_picture import curve_picture, curves_of
from nf.planning.hardware import accelerator
from nf.planning.loads import batch_shape
from nf.planning.operation_costs import Workload, operation_costs
from nf.planning.plan_picture import plan_picture, profiled_lengths, schedule, unit_lengths
from nf.planning.usage_picture import traced, usage_picture

LOAD = Load(2048, 1024, 512)
SVG = "{http://www.w3.org/2000/svg}"


def boxes(picture: str) -> dict[str, tuple[float, float, float]]:
    """Title of every titled box → x, y, width."""
    root = ElementTree.fromstring(picture)
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and title.text:
            found[title.text] = (float(rect.attrib["x"]), float(rect.attrib["y"]), float(rect.attrib["width"]))
    return found


@pytest.mark.parametrize("operations", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("make", [sequential_plan, nano_batch_plan])
def test_a_plan_shows_every_nano_operation_on_the_row_of_its_stream(make: object, operations: object) -> None:
    plan: PipelinePlan = make(operations, 512)  # type: ignore[operator]
    found = boxes(plan_picture(plan, operations, num_layers=3))  # type: ignore[arg-type]
    steps = unroll(plan, operations, 3)  # type: ignore[arg-type]
    assert set(found) == {f"{s.operation.name} [{s.start}, {s.stop}) layer {s.layer}" for s in steps}
    rows = {step.stream: set() for step in steps}  # type: ignore[var-annotated]
    for step in steps:
        rows[step.stream].add(found[f"{step.operation.name} [{step.start}, {step.stop}) layer {step.layer}"][1])
    assert all(len(row) == 1 for row in rows.values())
    assert len(set.union(*rows.values())) == len(plan.streams)


def test_a_schedule_keeps_streams_and_dependencies_and_wastes_nothing() -> None:
    plan = nano_batch_plan(MODEL.operations, 2048)
    lengths = profiled_lengths(formula_profile(), plan, batch_shape(LOAD))
    for seconds_of in (unit_lengths, lengths):
        steps = unroll(plan, MODEL.operations, 4)
        times = schedule(steps, seconds_of)
        for index, (step, (start, stop)) in enumerate(zip(steps, times, strict=True)):
            assert stop - start == pytest.approx(seconds_of(step))
            before = [times[other][1] for other in step.depends_on]
            before += [t[1] for s, t in zip(steps[:index], times, strict=False) if s.stream == step.stream][-1:]
            assert start == max([0.0, *before])
    alone = schedule(unroll(sequential_plan(MODEL.operations, 2048), MODEL.operations, 4), lengths)
    assert all(one[1] == pytest.approx(two[0]) for one, two in pairwise(alone))


def test_lengths_of_a_profile_are_told() -> None:
    plan = nano_batch_plan(MODEL.operations, 2048)
    profile, shape = formula_profile(), batch_shape(LOAD)
    picture = plan_picture(plan, MODEL.operations, profiled_lengths(profile, plan, shape), 2)
    found = boxes(picture)
    gate_up = next(title for title in found if title.startswith("gate_up_proj [0, 1024) layer 0"))
    assert float(re.findall(r"([\d.]+) µs", gate_up)[0]) == pytest.approx(
        1e6 * profile.cost("gate_up_proj", 1024).seconds, abs=0.1
    )
    assert "ms</text>" in picture
    assert not any(title.startswith("decode_attention [1024, 2048)") for title in found)  # has no rows there


def test_curves_show_every_arrangement() -> None:
    profile = formula_profile(bench=FormulaBench())
    curves = curves_of(profile, MODEL.operations)
    assert list(curves) == ["decode_attention"]
    picture = curve_picture(curves, "R & P")
    titles = [t.text or "" for t in ElementTree.fromstring(picture).iter(f"{SVG}title")]
    assert {t.partition(":")[0] for t in titles} == {"co-resident", *(f"{sms} SMs" for sms in (8, 12, 16, 20, 24, 32))}
    assert all("690 W" in t for t in titles)
    ElementTree.fromstring(curve_picture({}, "nothing"))


def spans(parts: int) -> list[Span]:
    """32 layers one after the other in 1 ms each: a GEMM on ``parts`` nano-batches, decode attention beside it."""
    found = []
    for layer in range(32):
        size = 2048 // parts
        for part in range(parts):
            name = f"gate_up_proj [{part * size}, {(part + 1) * size}) layer {layer}"
            found.append(Span("compute", name, 1000.0 * layer + 1000 / parts * part, 1000.0 / parts))
        found.append(Span("memory", f"decode_attention [0, 2048) layer {layer}", 1000.0 * layer + 500, 500.0))
    return [Span("step", "embed and plan", -50.0, 40.0), *found]


@pytest.mark.parametrize("parts", [1, 2])
def test_use_is_what_was_done_over_what_there_is(parts: int) -> None:
    card = accelerator("h200")
    step = traced("plan", spans(parts), MODEL, LOAD, card)
    assert step.micros == 3000
    costs = {cost.name: cost for cost in operation_costs(MODEL, Workload(1024, 512), 2048)}
    flops = (costs["gate_up_proj"].flops + costs["decode_attention"].flops) / 32
    assert step.usage["compute"].mean() == pytest.approx(flops / 1e-3 / card.compute, rel=1e-6)
    read = (costs["gate_up_proj"].memory_bytes + costs["decode_attention"].memory_bytes) / 32
    assert step.usage["memory"].mean() == pytest.approx(read / 1e-3 / card.memory_bandwidth, rel=1e-6)
    first, second = step.usage["memory"][:60].mean(), step.usage["memory"][60:120].mean()
    assert second > 3 * first  # attention runs in the second half of a layer
    picture = usage_picture([step, traced("none", [], MODEL, LOAD, card)], "Llama & H200")
    root = ElementTree.fromstring(picture)
    words = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    assert "3,000 µs for 3 layers" in words


def test_use_is_shown_from_the_beginning_of_a_layer_to_that_of_another() -> None:
    """Layer n takes (1000 + 10 n) µs, and attention of the one before still runs when it begins."""
    found, start = [], 0.0
    for layer in range(32):
        length = 1000.0 + 10 * layer
        found.append(Span("compute", f"gate_up_proj [0, 2048) layer {layer}", start, length))
        found.append(Span("memory", f"decode_attention [0, 2048) layer {layer}", start + 500, length))
        start += length
    step = traced("plan", found, MODEL, LOAD, accelerator("h200"))
    assert (step.micros, step.layers) == (3 * 1000 + 10 * (14 + 15 + 16), 3)


def test_use_of_few_layers_is_shown_to_the_end() -> None:
    model = declare(replace(shape("llama-3-8b"), num_layers=2))
    found = [Span("compute", f"gate_up_proj [0, 2048) layer {layer}", 1000.0 * layer, 900.0) for layer in range(2)]
    step = traced("plan", found, model, LOAD, accelerator("h200"))
    assert (step.micros, step.layers) == (1900, 2)
    assert "1,900 µs for 2 layers" in usage_picture([step], "few")
