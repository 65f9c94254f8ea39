"""The dependency check: silent for every order that is right, loud for every single one that is not."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from executor_cases import random_plan, small_model

from nf.errors import ModelError, PlanError
from nf.executors.row_versions import RowVersions
from nf.graphs.plan import LayerStep, PipelinePlan, nano_batch_plan, sequential_plan, unroll
from nf.models.declaration import Model
from nf.models.operations import Operation, Resource, Rows

TOKENS = 8
LAYERS = 3
DENSE = small_model()
MOE = small_model(architecture="MixtralForCausalLM", num_experts=2, experts_per_token=1)


def check(model: Model, steps: list[LayerStep], num_decode: int) -> None:
    """Run an order of steps through the check; all prefill rows are one request's."""
    versions = RowVersions(model.operations, LAYERS, TOKENS)
    first_rows = np.minimum(np.arange(TOKENS), num_decode).astype(np.int32)
    versions.begin(TOKENS, num_decode, first_rows)
    for step in steps:
        start, stop = step.start, step.stop
        if step.operation.rows is Rows.DECODE:
            stop = min(stop, num_decode)
        if step.operation.rows is Rows.PREFILL:
            start = max(start, num_decode)
        if start < stop:
            versions.run(step, start, stop)
    versions.finish()


def plans(model: Model) -> list[PipelinePlan]:
    return [
        sequential_plan(model.operations, TOKENS),
        nano_batch_plan(model.operations, TOKENS),
        *(random_plan(model, TOKENS, Random(seed)) for seed in range(5)),
    ]


@pytest.mark.parametrize("model", [DENSE, MOE])
@pytest.mark.parametrize("num_decode", [0, 3, TOKENS])
def test_every_order_a_plan_allows_passes(model: Model, num_decode: int) -> None:
    for plan in plans(model):
        check(model, list(unroll(plan, model.operations, LAYERS)), num_decode)
        for seed in range(5):
            check(model, list(unroll(plan, model.operations, LAYERS, Random(seed))), num_decode)


@pytest.mark.parametrize("model", [DENSE, MOE])
@pytest.mark.parametrize("num_decode", [0, TOKENS])
def test_breaking_any_single_dependency_is_seen(model: Model, num_decode: int) -> None:
    idle = "prefill_attention" if num_decode else "decode_attention"  # has no rows, so its order does not matter
    for plan in plans(model):
        steps = list(unroll(plan, model.operations, LAYERS))
        for index, step in enumerate(steps):
            for other in step.depends_on:
                if idle in (step.operation.name, steps[other].operation.name):
                    continue
                order = [*steps[:other], step, *steps[other:index], *steps[index + 1 :]]
                with pytest.raises(PlanError, match=r"reads row \d|did not write"):
                    check(model, order, num_decode)


def test_a_step_left_out_is_seen() -> None:
    steps = list(unroll(sequential_plan(DENSE.operations, TOKENS), DENSE.operations, LAYERS))
    for index, step in enumerate(steps):
        if step.operation.name != "prefill_attention":
            with pytest.raises(PlanError):
                check(DENSE, steps[:index] + steps[index + 1 :], TOKENS)


def test_the_message_says_what_was_read_and_what_should_have_been_there() -> None:
    steps = list(unroll(sequential_plan(DENSE.operations, TOKENS), DENSE.operations, LAYERS))
    names = [step.operation.name for step in steps]
    missing = len(DENSE.operations) + names.index("qkv_proj")
    expected = (
        r"rope_append of layer 1 reads row 0 of qkv, which should hold the result of qkv_proj of layer 1 "
        r"but holds that of qkv_proj of layer 0"
    )
    with pytest.raises(PlanError, match=expected):
        check(DENSE, steps[:missing] + steps[missing + 1 :], TOKENS)


def test_a_buffer_nobody_writes_is_refused() -> None:
    lost = Operation("attn_norm", Resource.MEMORY, ("hidden", "elsewhere"), ("hidden",))
    with pytest.raises(ModelError, match="elsewhere"):
        RowVersions((lost,), LAYERS, TOKENS)
