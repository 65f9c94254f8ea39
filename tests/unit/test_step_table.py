"""Where a step's time goes: work counted token by token, gaps on a timeline drawn by hand, and the table as text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from executor_cases import BatchMaker, Part, small_model

from nf.bench.environment import finite
from nf.bench.roofline import Ceilings
from nf.bench.step_table import GROUPS, StepTable, step_lines, step_table
from nf.executors.trace import Span
from nf.models.declaration import Model
from nf.models.registry import declare
from nf.scheduler.batch import Batch

CEILINGS = Ceilings(flops=8e12, joules_per_flop=1e-12, read_rate=2e12, joules_per_byte=1e-10, watts=700.0)
AROUND = ("embed and plan", "logits", "sampling")


def batch(decodes: list[int], prompts: list[tuple[int, int]]) -> Batch:
    """Sequences that decode after so many tokens, and chunks of (tokens before, new tokens)."""
    parts = [Part(slot, before, [1], decode=True) for slot, before in enumerate(decodes)]
    parts += [Part(len(parts) + i, before, [1] * new) for i, (before, new) in enumerate(prompts)]
    return BatchMaker(16, 200, 16, np.random.default_rng(0)).batch(parts)


def spans(model: Model, micros: float = 10.0) -> list[Span]:
    """Everything that a step runs, one after the other without gaps."""
    layers = range(model.config.num_layers)
    names = [f"{operation.name} [0, 64) layer {layer}" for layer in layers for operation in model.operations]
    names = [AROUND[0], *names, *AROUND[1:]]
    return [Span("all", name, 100 + micros * index, micros) for index, name in enumerate(names)]


def work(table: StepTable) -> dict[str, float]:
    return {part.name: part.work for part in table.parts}


@pytest.mark.parametrize("window", [None, 20])
def test_work_is_that_of_every_token(window: int | None) -> None:
    model = small_model(num_layers=3, sliding_window=window)
    config = model.config
    step = batch([5, 40, 16], [(0, 9), (30, 7)])
    found = work(step_table(spans(model), step, model))
    tokens, value = 3 + 9 + 7, 2
    keys = {row: min(int(position) + 1, window or 1000) for row, position in enumerate(step.positions)}
    per_key = 2 * config.num_kv_heads * config.head_dim * value
    assert found["decode_attention"] == 3 * per_key * sum(keys[row] for row in range(3))
    # Two products of head_dim, each two operations, per head and key.
    pairs = sum(keys[row] for row in range(3, tokens))
    assert found["prefill_attention"] == 3 * 4 * config.num_heads * config.head_dim * pairs
    shapes = {weight.name: weight.shape for weight in model.layer_weights}
    for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert found[name] == 3 * 2 * tokens * np.prod(shapes[name])
    assert found["logits"] == 2 * 5 * config.hidden_size * config.vocab_size
    assert found["sampling"] == 5 * config.vocab_size * 4
    assert found["attn_norm"] == found["ffn_norm"] == 3 * tokens * config.hidden_size * 2 * value
    assert found["rope_append"] == 3 * tokens * config.qkv_size * 2 * value
    assert found["embed and plan"] == tokens * config.hidden_size * 2 * value
    halves = work(step_table(spans(model), step, model, value_bytes=1))
    assert halves["decode_attention"] == found["decode_attention"] / 2
    assert halves["qkv_proj"] == found["qkv_proj"]


def test_a_token_meets_the_experts_it_chooses() -> None:
    dense = small_model()
    model = declare(replace(dense.config, architecture="MixtralForCausalLM", num_experts=5, experts_per_token=2))
    table = step_table(spans(model), batch([3], [(0, 10)]), model)
    found, config = work(table), model.config
    each = 2 * 11 * 2 * config.num_layers * config.hidden_size * config.intermediate_size  # of two matrices, stacked
    assert found["moe_gate_up_proj"] == 2 * each
    assert found["moe_down_proj"] == each
    assert {part.name for part in table.parts if part.group == "GEMMs"} == {
        "qkv_proj", "o_proj", "moe_gate_up_proj", "moe_down_proj", "logits",
    }  # fmt: skip
    assert {part.name for part in table.parts if part.group == "the rest"} >= {"router", "ffn_norm"}


def test_times_shares_and_ceilings() -> None:
    model = small_model()
    record = step_table(spans(model), batch([5], [(0, 9)]), model, CEILINGS).record()
    groups = {group["name"]: group for group in record["groups"]}
    assert list(groups) == list(GROUPS)
    assert record["seconds"] == pytest.approx(10e-6 * (3 + 2 * len(model.operations)))
    assert record["gaps"]["seconds"] == pytest.approx(0, abs=1e-12)
    assert sum(group["share"] for group in groups.values()) == pytest.approx(1)
    assert sum(row["seconds"] for row in record["operations"]) == pytest.approx(record["seconds"])
    assert groups["GEMMs"]["seconds"] == pytest.approx(10e-6 * (1 + 2 * 4))
    decode = groups["decode attention"]
    assert (decode["unit"], decode["ceiling"]) == ("B", 2e12)
    assert decode["rate"] == pytest.approx(decode["work"] / 20e-6)
    assert decode["share_of_ceiling"] == pytest.approx(decode["rate"] / 2e12)
    assert (groups["prefill attention"]["unit"], groups["prefill attention"]["ceiling"]) == ("FLOP", 8e12)
    order = [row["seconds"] for row in record["operations"]]
    assert order == sorted(order, reverse=True)


def test_gaps_are_where_no_stream_runs() -> None:
    model = small_model()
    times = [("a", 0, 4), ("b", 1, 2), ("b", 3, 4), ("a", 9, 1), ("a", 10, 2), ("b", 20, 5)]  # 7 to 9 and 12 to 20
    drawn = [Span(stream, "o_proj [0, 8) layer 0", 50.0 + start, micros) for stream, start, micros in times]
    record = step_table(drawn, batch([5], []), model).record()
    assert record["seconds"] == pytest.approx(25e-6)
    assert record["gaps"]["seconds"] == pytest.approx(10e-6)
    assert record["gaps"]["share"] == pytest.approx(0.4)


def test_the_table_as_text() -> None:
    model = small_model()
    step = batch([5, 25], [(0, 9)])
    lines = step_lines(finite(step_table(spans(model), step, model, CEILINGS).record()))
    assert lines[0] == "One step of 11 tokens, 2 decode at 16 keys, 3 sampled: 0.21 ms"
    names = [line[:26].strip() for line in lines[1:]]
    assert [name for name in names if name in (*GROUPS, "gaps")] == [*GROUPS, "gaps"]
    assert set(names[1:6]) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "logits"}  # below the GEMMs
    decode = next(line for line in lines if "decode attention" in line)
    work = 2 * 2 * model.config.num_kv_heads * model.config.head_dim * 2 * 32
    assert decode.split() == [
        "decode", "attention", "0.02", "ms", "9.5%", f"{work / 20e-6 / 1e12:.3g}", "TB/s",
        f"{work / 20e-6 / 2e12:.1%}", "of", "2",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 100


def test_without_ceilings_rates_stand_alone() -> None:
    model = small_model()
    record = finite(step_table(spans(model), batch([], [(0, 9)]), model).record())
    assert all(row["ceiling"] is None for row in record["groups"])
    lines = step_lines(record)
    assert lines[0].startswith("One step of 9 tokens, 0 decode, 1 sampled")
    assert not any(" of " in line for line in lines[1:])
    assert next(line for line in lines if "decode attention" in line).endswith("%")  # there was nothing to read


def test_a_plan_without_some_operation_has_no_line_for_it() -> None:
    model = small_model()
    lines = step_lines(
        finite(step_table([Span("a", "attn_norm [0, 8) layer 0", 0.0, 2.0)], batch([5], []), model).record())
    )
    assert [line[:26].strip() for line in lines[1:]] == ["the rest", "gaps"]
