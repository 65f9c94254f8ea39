"""Every way a plan can be wrong, made from one that is right, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import LLAMA, MIXTRAL, operation_lists, plans

from nf.errors import InputError, PlanError
from nf.graphs.plan import (
    NanoOperation,
    PipelinePlan,
    Stream,
    cross_stream_waits,
    load_plan,
    nano_batch_plan,
    sequential_plan,
    unroll,
    validate,
)
from nf.models.operations import Operation

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

PLAN = nano_batch_plan(LLAMA, 256)
Change = Callable[[PipelinePlan], PipelinePlan]


def with_stream(index: int, **changes: Any) -> Change:
    def change(plan: PipelinePlan) -> PipelinePlan:
        streams = list(plan.streams)
        streams[index] = replace(streams[index], **changes)
        return replace(plan, streams=tuple(streams))

    return change


def with_item(index: int, **changes: Any) -> Change:
    """Change a nano-operation of the compute stream: 0 is prefill_attention of nano-batch 0."""

    def change(plan: PipelinePlan) -> PipelinePlan:
        items = list(plan.streams[0].nano_operations)
        items[index] = replace(items[index], **changes)
        return with_stream(0, nano_operations=tuple(items))(plan)

    return change


def without(*gone: NanoOperation) -> Change:
    def change(plan: PipelinePlan) -> PipelinePlan:
        items = tuple(item for item in plan.streams[0].nano_operations if item not in gone)
        return with_stream(0, nano_operations=items)(plan)

    return change


def with_ranges(*ranges: tuple[int, int]) -> Change:
    return lambda plan: replace(plan, nano_batches=ranges)


def repeated(plan: PipelinePlan) -> PipelinePlan:
    items = plan.streams[0].nano_operations
    return with_stream(0, nano_operations=(*items, items[3]))(plan)


def swapped(plan: PipelinePlan) -> PipelinePlan:
    """ffn_norm and gate_up_proj of nano-batch 0 in the wrong order."""
    a, b, c, d, *rest = plan.streams[0].nano_operations
    return with_stream(0, nano_operations=(a, b, d, c, *rest))(plan)


WRONG: list[tuple[Change, str]] = [
    (lambda plan: replace(plan, dense_batch_size=0), "dense_batch_size: must be 1 to 1048576 tokens, got 0"),
    (
        lambda plan: replace(plan, loads=((5, 9), (0, 9))),
        "loads[1]: must be 1 to 256 decode tokens, the dense batch size, and 1 to 1073741824 keys, got [0, 9]",
    ),
    (
        lambda plan: replace(plan, loads=((257, 9),)),
        "loads[0]: must be 1 to 256 decode tokens, the dense batch size, and 1 to 1073741824 keys, got [257, 9]",
    ),
    (
        lambda plan: replace(plan, loads=((5, 0),)),
        "loads[0]: must be 1 to 256 decode tokens, the dense batch size, and 1 to 1073741824 keys, got [5, 0]",
    ),
    (
        lambda plan: replace(plan, loads=((5, 1 << 31),)),
        "loads[0]: must be 1 to 256 decode tokens, the dense batch size, and 1 to 1073741824 keys, got [5, 2147483648]",
    ),
    (lambda plan: replace(plan, loads=((5, 9),) * 4097), "loads: must be at most 4096, got 4097"),
    (with_ranges(), "nano_batches: must be 1 to 64 token ranges, got 0"),
    (
        with_ranges((0, 128), (128, 128)),
        "nano_batches[1]: [128, 128) is not a range of at least one token within the dense batch [0, 256)",
    ),
    (
        with_ranges((0, 128), (128, 257)),
        "nano_batches[1]: [128, 257) is not a range of at least one token within the dense batch [0, 256)",
    ),
    (
        with_ranges((-1, 128), (128, 256)),
        "nano_batches[0]: [-1, 128) is not a range of at least one token within the dense batch [0, 256)",
    ),
    (with_ranges((0, 120), (128, 256)), "streams: no nano-operation of attn_norm covers tokens [120, 128)"),
    (with_ranges((1, 128), (128, 256)), "streams: no nano-operation of attn_norm covers tokens [0, 1)"),
    (with_ranges((0, 128), (128, 250)), "streams: no nano-operation of attn_norm covers tokens [250, 256)"),
    (with_ranges((0, 130), (128, 256)), "streams: two nano-operations of attn_norm cover tokens [128, 130)"),
    (
        with_ranges((0, 128), (128, 256), (0, 256)),
        "nano_batches[2]: no nano-operation uses the tokens [0, 256)",
    ),
    (lambda plan: replace(plan, streams=()), "streams: must be 1 to 16 streams, got 0"),
    (with_stream(1, name="compute"), 'streams[1].name: "compute" names two streams; each needs its own name'),
    (with_stream(1, name=""), "streams[1].name: must not be empty"),
    (with_stream(1, nano_operations=()), "streams[1].nano_operations: must hold at least one nano-operation"),
    (with_stream(1, sms=0), 'streams[1].sms: must be at least 1 SM or "all", got 0'),
    (with_stream(1, sms=-8), 'streams[1].sms: must be at least 1 SM or "all", got -8'),
    (with_stream(1, sms=133), "streams[1].sms: asks for 133 SMs of a GPU that has 132"),
    (with_stream(1, priority=-99), "streams[1].priority: must be -16 to 16, got -99"),
    (
        with_item(0, operation="prefil_attention"),
        'streams[0].nano_operations[0].operation: "prefil_attention" is not an operation of the model; it has '
        "attn_norm, decode_attention, down_proj, ffn_norm, gate_up_proj, o_proj, prefill_attention, qkv_proj, "
        "rope_append",
    ),
    (
        with_item(4, nano_batch=2),
        "streams[0].nano_operations[4].nano_batch: must be the index of one of the 2 nano-batches, got 2",
    ),
    (
        with_item(4, nano_batch=-1),
        "streams[0].nano_operations[4].nano_batch: must be the index of one of the 2 nano-batches, got -1",
    ),
    (with_item(4, lag=-1), "streams[0].nano_operations[4].lag: must be 0 to 16 rounds, got -1"),
    (with_item(4, lag=10**9), "streams[0].nano_operations[4].lag: must be 0 to 16 rounds, got 1000000000"),
    (repeated, "streams[0].nano_operations[16]: gate_up_proj of nano-batch 0 is in the plan twice"),
    (without(NanoOperation("o_proj", 1, 1)), "streams: no nano-operation of o_proj covers tokens [128, 256)"),
    (
        without(NanoOperation("o_proj", 0, 1), NanoOperation("o_proj", 1, 1)),
        "streams: o_proj is in no stream; every operation of the model must run",
    ),
    (
        swapped,
        "streams[0]: gate_up_proj of nano-batch 0 in layer 0 waits for ffn_norm of nano-batch 0 in layer 0, "
        "which the stream runs later",
    ),
    (
        with_item(4, lag=0),
        "streams[0]: down_proj of nano-batch 0 in layer 0 waits for gate_up_proj of nano-batch 0 in layer 0, "
        "which the stream runs later",
    ),
    (
        with_item(4, lag=2),  # the next layer's attn_norm is in the round before
        "streams[0]: attn_norm of nano-batch 0 in layer 1 waits for down_proj of nano-batch 0 in layer 0, "
        "which the stream runs later",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=[sentence[:60] for _, sentence in WRONG])
def test_a_wrong_plan_is_refused_with_one_sentence(change: Change, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        validate(change(PLAN), LLAMA, gpu_sms=132)
    assert str(caught.value) == sentence
    assert isinstance(caught.value, InputError)
    assert caught.value.field == sentence.split(": ")[0]


def test_the_unchanged_plan_is_valid() -> None:
    validate(PLAN, LLAMA, gpu_sms=132)
    validate(PLAN, LLAMA)
    validate(replace(PLAN, loads=((1, 1), (256, 9))), LLAMA)


def test_partitions_are_disjoint_and_a_stream_of_all_sms_takes_none() -> None:
    def plan(*sms: Any) -> PipelinePlan:
        items = sequential_plan(LLAMA, 8).streams[0].nano_operations
        cut = [items[: -len(sms) + 1 or None], *([item] for item in items[len(items) - len(sms) + 1 :])]
        streams = tuple(Stream(f"s{i}", tuple(c), sms=n) for i, (c, n) in enumerate(zip(cut, sms, strict=True)))
        return PipelinePlan("p", 8, ((0, 8),), streams)

    validate(plan(100, 32), LLAMA, gpu_sms=132)
    validate(plan("all", "all", "all"), LLAMA, gpu_sms=132)
    validate(plan("all", 100, 32), LLAMA, gpu_sms=132)
    validate(plan(100, 40), LLAMA)  # nothing is known of the GPU
    for sms in [(100, 40), ("all", 100, 40), (66, 66, 8)]:
        with pytest.raises(
            PlanError, match=r"^streams: their partitions ask for 140 SMs together, but the GPU has 132"
        ):
            validate(plan(*sms), LLAMA, gpu_sms=132)


def test_the_example_runs_both_kinds_of_attention_side_by_side() -> None:
    plan = load_plan(str(EXAMPLES / "prefill-beside-decode.json"), LLAMA)
    validate(plan, LLAMA, gpu_sms=132)
    steps = unroll(plan, LLAMA, 2)
    index = {(step.operation.name, step.layer): i for i, step in enumerate(steps)}
    for layer in range(2):
        one, other = index["decode_attention", layer], index["prefill_attention", layer]
        assert steps[one].stream != steps[other].stream
        assert one not in steps[other].depends_on
        assert other not in steps[one].depends_on
        assert {one, other} <= set(cross_stream_waits(steps)[index["o_proj", layer]])


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match='"gate_up_proj" is not an operation of the model'):
        validate(PLAN, MIXTRAL)
    with pytest.raises(PlanError, match='"router" is not an operation of the model'):
        validate(nano_batch_plan(MIXTRAL, 256), LLAMA)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), operations=operation_lists())
def test_any_single_fault_in_a_valid_plan_is_refused(data: st.DataObject, operations: tuple[Operation, ...]) -> None:
    plan = data.draw(plans(operations))
    validate(plan, operations)
    s = data.draw(st.integers(0, len(plan.streams) - 1))
    items = plan.streams[s].nano_operations
    i = data.draw(st.integers(0, len(items) - 1))
    n = data.draw(st.integers(0, len(plan.nano_batches) - 1))
    start, stop = plan.nano_batches[n]
    shifted = (start, stop - 1) if stop < plan.dense_batch_size else (start, stop + 1)
    faults: dict[str, PipelinePlan] = {
        "dropped": with_stream(s, nano_operations=items[:i] + items[i + 1 :])(plan),
        "twice": with_stream(s, nano_operations=(*items, items[i]))(plan),
        "range": replace(plan, nano_batches=(*plan.nano_batches[:n], shifted, *plan.nano_batches[n + 1 :])),
        "longer": replace(plan, dense_batch_size=plan.dense_batch_size + 1),
        "unused": replace(plan, nano_batches=(*plan.nano_batches, (0, 1))),
        "unknown": with_stream(s, nano_operations=(*items, NanoOperation("other", 0)))(plan),
    }
    for fault, faulty in faults.items():
        with pytest.raises(PlanError) as caught:
            validate(faulty, operations)
        assert "\n" not in str(caught.value), fault
