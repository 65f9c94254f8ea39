"""The plan as a document: JSON out and in, loading, and the sentence for each way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import LLAMA, MIXTRAL, plans

from nf.errors import PlanError
from nf.graphs.plan import (
    BUILT_IN,
    NanoOperation,
    PipelinePlan,
    Stream,
    load_plan,
    nano_batch_plan,
    sequential_plan,
    validate,
)

names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
documents = st.builds(
    PipelinePlan,
    name=names,
    dense_batch_size=st.integers(),
    nano_batches=st.lists(st.tuples(st.integers(), st.integers()), max_size=3).map(tuple),
    streams=st.lists(
        st.builds(
            Stream,
            name=names,
            nano_operations=st.lists(st.builds(NanoOperation, names, st.integers(), st.integers()), max_size=3).map(
                tuple
            ),
            sms=st.just("all") | st.integers(),
            priority=st.integers(),
        ),
        max_size=3,
    ).map(tuple),
    model=st.none() | names,
    gpu=st.none() | names,
    loads=st.lists(st.tuples(st.integers(), st.integers()), max_size=3).map(tuple),
)


def document(**changes: Any) -> dict[str, Any]:
    """The JSON form of a small valid plan, with some fields changed; None removes one."""
    fields: dict[str, Any] = json.loads(sequential_plan(LLAMA, 8).to_json()) | changes
    return {name: value for name, value in fields.items() if value is not None}


def with_stream(**changes: Any) -> dict[str, Any]:
    return document(streams=[document()["streams"][0] | changes])


def with_item(**changes: Any) -> dict[str, Any]:
    return with_stream(nano_operations=[{"operation": "o_proj", "nano_batch": 0} | changes])


@settings(max_examples=100, deadline=None)
@given(plan=documents | plans(LLAMA))
def test_json_brings_back_the_same_plan(plan: PipelinePlan) -> None:
    text = plan.to_json()
    assert PipelinePlan.from_json(text) == plan
    assert PipelinePlan.from_json(json.dumps(json.loads(text))) == plan


def test_json_has_a_line_per_nano_operation() -> None:
    lines = nano_batch_plan(LLAMA, 256).to_json().splitlines()
    assert '        {"operation": "decode_attention", "nano_batch": 1, "lag": 1},' in lines
    assert sum('"operation"' in line for line in lines) == 2 * len(LLAMA)


def test_what_may_be_left_out_takes_its_default() -> None:
    text = """{"version": 1, "name": "p", "dense_batch_size": 8, "nano_batches": [[0, 8]],
               "streams": [{"name": "s", "nano_operations": [{"operation": "o_proj", "nano_batch": 0}]}]}"""
    stream = Stream("s", (NanoOperation("o_proj", 0, lag=0),), sms="all", priority=0)
    assert PipelinePlan.from_json(text) == PipelinePlan("p", 8, ((0, 8),), (stream,), model=None, gpu=None, loads=())


KNOWN = "version, name, dense_batch_size, nano_batches, streams, model, gpu, loads"
WRONG: list[tuple[Any, str]] = [
    ([], "plan: must be a JSON object, got a list"),
    (document(version=None), "version: the field is missing; it must be given"),
    (document(version=2, new=1), "version: format 2 is unknown; this release reads format 1"),
    (document(version="1"), 'version: must be an integer, got "1"'),
    (document(name=None), "name: the field is missing; it must be given"),
    (document(name=5), "name: must be a string of printable characters, got 5"),
    (
        document(name="\x1b[2J"),
        r'name: must be a string of printable characters, got "\u001b[2J"',
    ),
    (document(dense_batch_size=8.0), "dense_batch_size: must be an integer, got 8.0"),
    (document(dense_batch_size=True), "dense_batch_size: must be an integer, got true"),
    (document(nano_batches={}), "nano_batches: must be a list, got an object"),
    (document(nano_batches=[[0, 8], 8]), "nano_batches[1]: must be a token range [start, stop], got 8"),
    (document(nano_batches=[[0, 4, 8]]), "nano_batches[0]: must be a token range [start, stop], got a list"),
    (document(nano_batches=[[0, "8"]]), 'nano_batches[0][1]: must be an integer, got "8"'),
    (document(colour="red"), f"colour: the field is unknown; known are {KNOWN}"),
    (document(**{"a\nb": 1}), rf'"a\nb": the field is unknown; known are {KNOWN}'),
    (document(gpu=4), "gpu: must be a string of printable characters, got 4"),
    (document(loads=682), "loads: must be a list, got 682"),
    (document(loads=[682]), "loads[0]: must be [decode tokens, keys], got 682"),
    (document(loads=[[1, 2], [682, 6.5]]), "loads[1][1]: must be an integer, got 6.5"),
    (document(loads=[[True, 5]]), "loads[0][0]: must be an integer, got true"),
    (document(streams=[7]), "streams[0]: must be a JSON object, got 7"),
    (with_stream(sms="half"), 'streams[0].sms: must be a number of SMs or "all", got half'),
    (with_stream(sms=False), 'streams[0].sms: must be a number of SMs or "all", got false'),
    (with_stream(sms=1.5), 'streams[0].sms: must be a number of SMs or "all", got 1.5'),
    (with_stream(priority="x" * 99), f'streams[0].priority: must be an integer, got "{"x" * 36}...'),
    (
        with_stream(nano_ops=[]),
        "streams[0].nano_ops: the field is unknown; known are name, nano_operations, sms, priority",
    ),
    (
        with_item(operation=None),
        "streams[0].nano_operations[0].operation: must be a string of printable characters, got null",
    ),
    (with_item(lag="1"), 'streams[0].nano_operations[0].lag: must be an integer, got "1"'),
    (with_item(nano_batch=[0]), "streams[0].nano_operations[0].nano_batch: must be an integer, got a list"),
    (
        with_item(layer=3),
        "streams[0].nano_operations[0].layer: the field is unknown; known are operation, nano_batch, lag",
    ),
]


@pytest.mark.parametrize(("value", "sentence"), WRONG, ids=[sentence[:60] for _, sentence in WRONG])
def test_a_wrong_document_is_refused_with_one_sentence(value: Any, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        PipelinePlan.from_json(json.dumps(value))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"version": 1,\n "name" "p"}', "line 2, column 9: the plan is not valid JSON (Expecting ':' delimiter)"),
        ("", "line 1, column 1: the plan is not valid JSON (Expecting value)"),
        ('{"version": 1, "version": 1}', "version: the field stands twice in one JSON object; it may stand once"),
        ("[" * 100_000, "plan: the JSON is nested too deeply to be a plan"),
        ('{"version": 1' + "0" * 5000 + "}", "plan: the JSON holds a number that is too long to be read"),
        ('{"version": NaN}', "version: must be an integer, got NaN"),
    ],
)
def test_text_that_is_no_plan_is_refused_with_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        PipelinePlan.from_json(text)
    assert str(caught.value) == sentence


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_text_causes_anything_but_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        PipelinePlan.from_json(text)


@pytest.mark.parametrize("operations", [LLAMA, MIXTRAL], ids=["dense", "experts"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_plans_are_made_for_the_model_and_batch(name: str, operations: Any) -> None:
    plan = load_plan(name, operations, 384)
    assert plan == BUILT_IN[name](operations, 384)
    assert (plan.name, plan.dense_batch_size) == (name, 384)
    validate(plan, operations)


def test_a_file_is_read_and_checked(tmp_path: Path) -> None:
    plan = nano_batch_plan(LLAMA, 64)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert load_plan(path, LLAMA) == load_plan(str(path), LLAMA, 64, gpu_sms=132) == plan

    def sentence(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(PlanError) as caught:
            load_plan(*args, **kwargs)
        return str(caught.value)

    other_size = sentence(path, LLAMA, 128)
    assert other_size == f"{path}: dense_batch_size: the plan is made for 64 tokens, but 128 are asked for"
    assert sentence(path, MIXTRAL).startswith(f"{path}: streams[0].nano_operations[3].operation: ")
    path.write_text("{")
    assert sentence(path, LLAMA).startswith(f"{path}: line 1, column 2: the plan is not valid JSON")
    path.write_bytes(b"\xff{}")
    assert sentence(path, LLAMA) == f"{path}: is not UTF-8 text; a plan is a JSON file"
    path.write_text(" " * ((1 << 20) + 1))
    assert sentence(path, LLAMA) == f"{path}: is larger than a plan can be (1 MiB)"
    assert sentence(tmp_path, LLAMA) == f"{tmp_path}: cannot be read (Is a directory)"
    gone = "is neither a file nor a built-in plan (sequential, nano-batch)"
    assert sentence("nanobatch", LLAMA, 64) == f"nanobatch: {gone}"
    assert sentence("", LLAMA, 64) == f"plan: {gone}"
    assert "cannot be read" in sentence("a\0b", LLAMA, 64)
    assert sentence("nano-batch", LLAMA) == 'dense_batch_size: must be given for the built-in plan "nano-batch"'
