"""A pipeline plan as text: streams side by side, time downwards, and what waits for what across them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nf.graphs.plan import LayerStep, PipelinePlan, cross_stream_waits, unroll
from nf.models.operations import Operation

WIDTH = 100
INDENT, GAP = "  ", "   "


def timeline(plan: PipelinePlan, operations: Sequence[Operation], num_layers: int | None = None) -> str:
    """The plan for people to read, at most 100 columns wide where names allow.

    Args:
        plan: valid for ``operations``.
        operations: of one layer.
        num_layers: show every round over so many layers; None shows one round in the middle of a long model.
    """
    view = _View(plan, operations, num_layers or 3 * plan.max_lag + 3)
    if num_layers is not None:
        rounds = [view.round(r, f"Round {r}", lambda step: f"layer {step.layer}") for r in range(view.num_rounds)]
        return "\n".join([_head(plan), *rounds])
    middle = 2 * plan.max_lag + 1  # every nano-operation has a layer here, and had one in the round before
    title = "One round (r); layer r-1 is the one before." if plan.max_lag else "One round (r)."
    return "\n".join([_head(plan), view.round(middle, title, lambda step: _relative(step.layer - middle))])


def _head(plan: PipelinePlan) -> str:
    parts = f"{_count(len(plan.nano_batches), 'nano-batch')} on {_count(len(plan.streams), 'stream')}"
    lines = [f"Plan {plan.name}: {plan.dense_batch_size} tokens in {parts}"]
    if plan.model or plan.gpu:
        lines.append(f"made for {' on '.join(name for name in (plan.model, plan.gpu) if name)}")
    if plan.loads:
        tokens, keys = plan.loads[0]
        more = f", and {_count(len(plan.loads) - 1, 'more load')}" if len(plan.loads) > 1 else ""
        lines.append(f"for steps in which about {tokens} tokens decode and see {keys} keys each{more}")
    ranges = [_range(*nano_batch) for nano_batch in plan.nano_batches]
    lines += [f"{INDENT}nano-batch {index}: tokens {tokens}" for index, tokens in enumerate(ranges)]
    lines += ["Time runs downwards; │: may still run."] * (len(plan.streams) > 1)
    return "\n".join(lines) + "\n"


class _View:
    """The steps of a plan over some layers, and how to print those of one round."""

    def __init__(self, plan: PipelinePlan, operations: Sequence[Operation], num_layers: int) -> None:
        self.plan = plan
        self.steps = unroll(plan, operations, num_layers)
        self.waits = cross_stream_waits(self.steps)
        self.num_rounds = num_layers + plan.max_lag
        lags = {
            (item.operation, plan.nano_batches[item.nano_batch]): item.lag
            for stream in plan.streams
            for item in stream.nano_operations
        }
        self.rounds = [step.layer + lags[step.operation.name, (step.start, step.stop)] for step in self.steps]
        self.name_width = max(len(operation.name) for operation in operations)
        self.range_width = max(len(_range(*nano_batch)) for nano_batch in plan.nano_batches)

    def round(self, round_: int, title: str, layer: Callable[[LayerStep], str]) -> str:
        """The timeline of one round and the waits of its nano-operations."""
        indices = [index for index, in_round in enumerate(self.rounds) if in_round == round_]
        lines = [title, "", *self.columns(indices, layer)]
        waits = [(index, other) for index in indices for other in self.waits[index]]
        if waits:
            lines += ["", "Waits across streams (* for a step of an earlier round)"]
        waiting = [self.cell(self.steps[index], layer) for index, _ in waits]
        for (_, other), text in zip(waits, waiting, strict=True):
            mark = "" if self.rounds[other] == round_ else " *"
            before = self.cell(self.steps[other], layer)
            lines.append(f"{INDENT}{text:<{max(map(len, waiting))}}  after  {before}{mark}")
        return "\n".join(lines) + "\n"

    def columns(self, indices: list[int], layer: Callable[[LayerStep], str]) -> list[str]:
        """Streams side by side, as many as fit, then the next ones below."""
        cells = self.cells(indices, layer)
        width = max((len(cell) for column in cells for cell in column), default=0)
        heads = [_stream_head(self.plan, s) for s in range(len(cells))]
        width = max(width, *(len(head) for head in heads))
        fit = max(1, (WIDTH - len(INDENT) + len(GAP)) // (width + len(GAP)))
        lines: list[str] = []
        for first in range(0, len(cells), fit):
            band = range(first, min(first + fit, len(cells)))
            rows = zip(*(cells[s] for s in band), strict=True)
            texts = [[heads[s] for s in band], ["─" * width for _ in band], *([*row] for row in rows if any(row))]
            lines += [""] * bool(lines)
            lines += [(INDENT + GAP.join(f"{text:<{width}}" for text in row)).rstrip() for row in texts]
        return lines

    def cells(self, indices: list[int], layer: Callable[[LayerStep], str]) -> list[list[str]]:
        """Per stream, one text per row; a nano-operation stands below all of this round that it waits for.

        ``│`` below a nano-operation: it may still run there, since nothing that follows has waited for it yet.
        """
        row: dict[int, int] = {}
        free = [0] * len(self.plan.streams)  # next row of each stream
        released: dict[int, int] = {}  # step → first row of another stream that waits for it
        for index in indices:
            stream = self.steps[index].stream
            known = [other for other in self.waits[index] if other in row]
            row[index] = max([free[stream], *(row[other] + 1 for other in known)])
            free[stream] = row[index] + 1
            for other in known:
                released[other] = min(released.get(other, row[index]), row[index])
        height = max(free)
        cells = [[""] * height for _ in self.plan.streams]
        for index in reversed(indices):  # so that a stream's later nano-operation ends the bar of the one before
            column = cells[self.steps[index].stream]
            column[row[index]] = self.cell(self.steps[index], layer)
            for below in range(row[index] + 1, released.get(index, height)):
                if column[below]:
                    break
                column[below] = "│"
        return cells

    def cell(self, step: LayerStep, layer: Callable[[LayerStep], str]) -> str:
        tokens = _range(step.start, step.stop)
        return f"{step.operation.name:<{self.name_width}} {tokens:<{self.range_width}} {layer(step)}"


def _stream_head(plan: PipelinePlan, index: int) -> str:
    stream = plan.streams[index]
    sms = "all SMs" if stream.sms == "all" else f"{stream.sms} SMs"
    return f"{stream.name}: {sms}" + (f", priority {stream.priority}" if stream.priority else "")


def _relative(difference: int) -> str:
    return f"r{difference:+d}" if difference else "r"


def _range(start: int, stop: int) -> str:
    return f"[{start}, {stop})"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {noun if number == 1 else plural}"
