"""The built-in plans do what they promise: above all, decode attention beside the other half's GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from plan_cases import LLAMA, MIXTRAL, chain, closure

from nf.errors import PlanError
from nf.graphs.plan import (
    LayerStep,
    NanoOperation,
    cross_stream_waits,
    nano_batch_plan,
    sequential_plan,
    unroll,
    validate,
)
from nf.models.operations import Operation, Resource, Rows

MODELS = pytest.mark.parametrize("operations", [LLAMA, MIXTRAL], ids=["dense", "experts"])
LAYERS = 6


def concurrent_with(steps: Sequence[LayerStep], index: int) -> set[int]:
    """Steps that neither must come before step ``index`` nor after it, on a machine with events and ordered streams."""
    waits = {(other, step) for step, others in enumerate(cross_stream_waits(steps)) for other in others}
    before = closure(len(steps), waits | chain(steps))
    return {i for i in range(len(steps)) if i != index and not before[index] >> i & 1 and not before[i] >> index & 1}


@MODELS
def test_every_decode_attention_may_run_beside_a_whole_layer_of_the_other_nano_batch(
    operations: tuple[Operation, ...],
) -> None:
    steps = unroll(nano_batch_plan(operations, 256), operations, LAYERS)
    gemms = {operation.name for operation in operations if operation.resource is Resource.COMPUTE}
    for index, step in enumerate(steps):
        if step.operation.name != "decode_attention" or not 0 < step.layer < LAYERS - 1:
            continue
        beside = [steps[i] for i in concurrent_with(steps, index) if steps[i].start != step.start]
        assert gemms <= {other.operation.name for other in beside}
        # The half that is ahead overlaps with the layer before, the other one with its own and the next layer's start.
        ffn = {other.layer for other in beside if other.operation.name in ("down_proj", "moe_down_proj")}
        assert (step.layer if step.start else step.layer - 1) in ffn


@MODELS
def test_the_memory_stream_holds_the_reading_of_the_cache_alone(operations: tuple[Operation, ...]) -> None:
    plan = nano_batch_plan(operations, 256)
    assert [stream.name for stream in plan.streams] == ["compute", "memory"]
    compute, memory = plan.streams
    assert memory.nano_operations == (NanoOperation("decode_attention", 1, 1), NanoOperation("decode_attention", 0, 0))
    assert memory.priority < compute.priority
    assert compute.sms == memory.sms == "all"
    assert len(compute.nano_operations) == 2 * (len(operations) - 1)


def test_two_events_per_nano_batch_and_layer_are_enough() -> None:
    waits = cross_stream_waits(unroll(nano_batch_plan(LLAMA, 256), LLAMA, LAYERS))
    assert sum(map(len, waits)) == 2 * 2 * LAYERS


@pytest.mark.parametrize(
    ("tokens", "middle"), [(2, 1), (3, 1), (128, 64), (129, 128), (255, 128), (300, 128), (384, 256), (2048, 1024)]
)
def test_the_halves_meet_at_a_whole_tile_if_there_is_more_than_one(tokens: int, middle: int) -> None:
    plan = nano_batch_plan(LLAMA, tokens)
    assert plan.nano_batches == ((0, middle), (middle, tokens))
    validate(plan, LLAMA)


@pytest.mark.parametrize("tokens", [1, 0, -5])
def test_one_token_cannot_be_halved(tokens: int) -> None:
    with pytest.raises(PlanError, match=r"^dense_batch_size: must be at least 2 tokens to make 2 nano-batches, got"):
        nano_batch_plan(LLAMA, tokens)


def test_collectives_get_a_stream_of_their_own() -> None:
    """As with tensor parallelism: a collective after o_proj and one after down_proj."""

    def reduce(name: str) -> Operation:
        return Operation(name, Resource.NETWORK, ("hidden",), ("hidden",))

    at = [operation.name for operation in LLAMA].index("o_proj") + 1
    operations = (*LLAMA[:at], reduce("attn_all_reduce"), *LLAMA[at:], reduce("ffn_all_reduce"))
    plan = nano_batch_plan(operations, 256)
    validate(plan, operations)
    assert [stream.name for stream in plan.streams] == ["compute", "memory", "network"]
    assert {item.operation for item in plan.streams[2].nano_operations} == {"attn_all_reduce", "ffn_all_reduce"}
    steps = unroll(plan, operations, LAYERS)
    for index, step in enumerate(steps):
        if step.operation.resource is Resource.NETWORK and 0 < step.layer < LAYERS - 1:
            assert any(steps[i].stream == 1 for i in concurrent_with(steps, index))


def test_without_decode_attention_the_nano_batches_follow_each_other() -> None:
    operations = tuple(op for op in LLAMA if op.rows is not Rows.DECODE)
    plan = nano_batch_plan(operations, 256)
    validate(plan, operations)
    assert [stream.name for stream in plan.streams] == ["compute"]
    assert plan.max_lag == 0


@MODELS
def test_the_sequential_plan_has_one_nano_batch_and_one_stream(operations: tuple[Operation, ...]) -> None:
    plan = sequential_plan(operations, 100)
    validate(plan, operations, gpu_sms=1)
    assert plan.nano_batches == ((0, 100),)
    assert [[item.operation for item in s.nano_operations] for s in plan.streams] == [[op.name for op in operations]]
