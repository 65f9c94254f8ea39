"""Where the time of one step goes: its nano-operations by kind, each beside what bounds it.

What the step must compute or move follows from its batch and the model's shape. Matrix products and attention over
prompts stand beside the rate of the model's products, all else beside a streaming read, both as measured after the
run (ceilings.py). What a kernel finds in the L2 cache may come faster than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nf.bench.roofline import Ceilings, active_shape
from nf.executors.trace import Span
from nf.models.declaration import Model
from nf.scheduler.batch import Batch

LOGIT_BYTES = 4
GROUPS = ("GEMMs", "decode attention", "prefill attention", "the rest")

Unit = Literal["FLOP", "B"]


@dataclass(frozen=True, slots=True)
class Part:
    """All nano-operations of one operation in all layers, or what stands before or after the layers.

    Args:
        name: the operation's.
        group: one of GROUPS.
        seconds: of all of them together.
        work: what they must compute or move, in ``unit``.
        ceiling: units per second that there could be; NaN if that was not measured.
    """

    name: str
    group: str
    seconds: float
    work: float
    unit: Unit
    ceiling: float

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.work / self.seconds if self.seconds else math.nan


@dataclass(frozen=True, slots=True)
class StepTable:
    """One step.

    Args:
        tokens, decodes, samples: rows of its dense batch, those that decode, tokens it sampled.
        kv_tokens: keys that its decodes read, in one layer.
        seconds: from the first nano-operation's start to the last one's end.
        gaps: of these, seconds in which none ran.
        parts: the longest first.
    """

    tokens: int
    decodes: int
    samples: int
    kv_tokens: int
    seconds: float
    gaps: float
    parts: tuple[Part, ...]

    def record(self) -> dict[str, Any]:
        """As plain data; shares are of ``seconds``, and of streams that run side by side add up to more than one."""
        return {
            "tokens": self.tokens,
            "decodes": self.decodes,
            "samples": self.samples,
            "kv_tokens": self.kv_tokens,
            "seconds": self.seconds,
            "gaps": {"seconds": self.gaps, "share": self.gaps / self.seconds},
            "groups": [self._row(name, [part for part in self.parts if part.group == name]) for name in GROUPS],
            "operations": [{"group": part.group, **self._row(part.name, [part])} for part in self.parts],
        }

    def _row(self, name: str, parts: Sequence[Part]) -> dict[str, Any]:
        """Some parts of one group as if they were one; without any there is no work, and rates are NaN."""
        seconds, work = sum(part.seconds for part in parts), sum(part.work for part in parts)
        rate = work / seconds if seconds else math.nan
        ceiling = parts[0].ceiling if parts else math.nan
        return {
            "name": name,
            "seconds": seconds,
            "share": seconds / self.seconds,
            "work": work,
            "unit": parts[0].unit if parts else None,
            "rate": rate,
            "ceiling": ceiling,
            "share_of_ceiling": rate / ceiling,
        }


def step_table(
    spans: Sequence[Span], batch: Batch, model: Model, ceilings: Ceilings | None = None, value_bytes: int = 2
) -> StepTable:
    """What the spans of a step say.

    Args:
        spans: at least one.
        batch: that the step ran.
        value_bytes: of an activation's, a key's or a value's element.
    """
    seconds: dict[str, float] = {}
    for span in spans:
        name = span.name.split(" [")[0]
        seconds[name] = seconds.get(name, 0.0) + span.duration_us * 1e-6
    work = _Work(batch, model, value_bytes)
    parts = [_part(name, took, work, ceilings) for name, took in seconds.items()]
    begin = min(span.start_us for span in spans)
    whole = max(span.start_us + span.duration_us for span in spans) - begin
    return StepTable(
        tokens=batch.num_tokens,
        decodes=batch.num_decode,
        samples=len(batch.sampling.rows),
        kv_tokens=work.decode_keys,
        seconds=whole * 1e-6,
        gaps=(whole - _covered(spans)) * 1e-6,
        parts=tuple(sorted(parts, key=lambda part: -part.seconds)),
    )


def _part(name: str, seconds: float, work: _Work, ceilings: Ceilings | None) -> Part:
    group, amount, unit = work.of(name)
    rate = math.nan if ceilings is None else ceilings.flops if unit == "FLOP" else ceilings.read_rate
    return Part(name, group, seconds, amount, unit, rate)


class _Work:
    """What each operation has to do in a step, in all layers together."""

    def __init__(self, batch: Batch, model: Model, value_bytes: int) -> None:
        config = self._config = model.config
        self._active = {weight.name: math.prod(active_shape(model, weight)) for weight in model.layer_weights}
        self._value_bytes = value_bytes
        self._tokens, self._samples, decodes = batch.num_tokens, len(batch.sampling.rows), batch.num_decode
        window = config.sliding_window or int(batch.kv_lens.max(initial=0))
        self.decode_keys = int(np.minimum(batch.kv_lens[:decodes], window).sum())
        seen = np.minimum(batch.positions[decodes:].astype(np.int64) + 1, window)  # keys of each prompt token
        self._prompt_pairs = int(seen.sum())

    def of(self, name: str) -> tuple[str, float, Unit]:
        """Group, amount and unit of an operation."""
        config, tokens, value = self._config, self._tokens, self._value_bytes
        layers, row = config.num_layers, config.hidden_size * value
        if name.endswith("_proj"):
            return "GEMMs", 2.0 * layers * tokens * self._active[name], "FLOP"
        if name == "logits":
            return "GEMMs", 2.0 * self._samples * config.hidden_size * config.vocab_size, "FLOP"
        if name == "decode_attention":
            kv_bytes = 2 * config.num_kv_heads * config.head_dim * value * self.decode_keys
            return "decode attention", float(layers * kv_bytes), "B"
        if name == "prefill_attention":
            return "prefill attention", 4.0 * layers * config.num_heads * config.head_dim * self._prompt_pairs, "FLOP"
        moved = {
            "attn_norm": layers * 2 * row * tokens,
            "ffn_norm": layers * 2 * row * tokens,
            "router": layers * row * tokens,
            "rope_append": layers * 2 * config.qkv_size * value * tokens,
            "sampling": LOGIT_BYTES * config.vocab_size * self._samples,
        }
        return "the rest", float(moved.get(name, 2 * row * tokens)), "B"  # else it is the embedding


def _covered(spans: Sequence[Span]) -> float:
    """Microseconds in which some span runs."""
    covered, end = 0.0, -math.inf
    for start, stop in sorted((span.start_us, span.start_us + span.duration_us) for span in spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def step_lines(step: dict[str, Any]) -> list[str]:
    """The record of a table as text: groups, and below them the operations of those that have several."""
    decodes = f"{step['decodes']:,} decode"
    if step["decodes"]:
        decodes += f" at {step['kv_tokens'] / step['decodes']:,.0f} keys"
    head = f"{step['tokens']:,} tokens, {decodes}, {step['samples']:,} sampled: {step['seconds'] * 1e3:.2f} ms"
    lines = [f"One step of {head}"]
    for group in step["groups"]:
        if group["unit"] is None:
            continue
        own = [part for part in step["operations"] if part["group"] == group["name"]]
        lines.append(_line(group, 2))
        lines += [_line(part, 4) for part in own] if len(own) > 1 else []
    gaps = step["gaps"]
    return [*lines, f"  {'gaps':24}{gaps['seconds'] * 1e3:9.2f} ms {gaps['share']:7.1%}"]


def _line(row: dict[str, Any], indent: int) -> str:
    unit = "TFLOP/s" if row["unit"] == "FLOP" else "TB/s"
    text = f"{' ' * indent}{row['name']:{26 - indent}}{row['seconds'] * 1e3:9.2f} ms {row['share']:7.1%}"
    if not row["work"] or row["rate"] is None:
        return text
    text += f"  {_short(row['rate']):>6} {unit:7}"
    if row["share_of_ceiling"] is None:
        return text.rstrip()
    return f"{text} {row['share_of_ceiling']:6.1%} of {_short(row['ceiling'])}"


def _short(rate: float) -> str:
    """Tera-units per second to three digits."""
    return f"{rate / 1e12:.3g}" if rate < 1e15 else f"{rate / 1e12:.0f}"
