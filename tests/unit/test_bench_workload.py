"""Workloads: the same requests every time, the lengths that were asked for, and traces that are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nf.bench.workload import Limits, Workload, constant, from_trace, read_trace
from nf.errors import InputError

TRACE = """\
TIMESTAMP,GeneratedTokens,ContextTokens
a,5,10
b,50,20

c,7,300
d,9,40
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "trace.csv"
    file.write_bytes(text.encode())
    return file


def test_constant_lengths() -> None:
    workload = constant(30, 4, 5)
    assert workload.input_lens.tolist() == [30] * 5
    assert workload.output_lens.tolist() == [4] * 5
    assert (len(workload), workload.input_tokens, workload.output_tokens) == (5, 150, 20)


def test_prompts_have_their_lengths_and_depend_on_the_seed_alone() -> None:
    lens = np.array([3, 1, 200])
    workload = Workload("w", lens, lens, seed=4)
    prompts = workload.prompts(97)
    assert [len(prompt) for prompt in prompts] == [3, 1, 200]
    assert all(type(token) is int and 0 <= token < 97 for prompt in prompts for token in prompt)
    assert len(set(prompts[2])) > 50
    assert prompts == Workload("other name", lens.copy(), lens + 1, seed=4).prompts(97)
    assert prompts != Workload("w", lens, lens, seed=5).prompts(97)


def test_token_ids_are_the_ones_they_have_always_been() -> None:
    """Records of different versions, and of other engines, are compared: the draw must not change."""
    expected = np.random.default_rng([7, 1]).integers(0, 1000, 6)
    assert constant(3, 1, 2, seed=7).prompts(1000) == [expected[:3].tolist(), expected[3:].tolist()]


def test_warm_up_is_short_and_of_other_tokens() -> None:
    workload = Workload("w", np.array([9, 8, 7]), np.array([100, 3, 50]))
    warm = workload.warmup(2, 16)
    assert (warm.input_lens.tolist(), warm.output_lens.tolist()) == ([9, 8], [16, 3])
    assert warm.prompts(5000)[0] != workload.prompts(5000)[0]


def test_trace_is_read_by_column_names(tmp_path: Path) -> None:
    for text in (TRACE, TRACE.replace("\n", "\r\n"), "\ufeff" + TRACE):
        input_lens, output_lens = read_trace(write(tmp_path, text))
        assert input_lens.tolist() == [10, 20, 300, 40]
        assert output_lens.tolist() == [5, 50, 7, 9]


def test_requests_are_drawn_without_replacement_within_the_limits(tmp_path: Path) -> None:
    file = write(tmp_path, TRACE)
    assert set(from_trace(file, 4).input_lens.tolist()) == {10, 20, 300, 40}
    for limits, expected in (
        (Limits(input_len=40), {10, 20, 40}),
        (Limits(output_len=9), {10, 300, 40}),
        (Limits(total_len=49), {10, 40}),
        (Limits(input_len=39, output_len=49), {10}),
    ):
        workload = from_trace(file, len(expected), limits=limits)
        assert set(workload.input_lens.tolist()) == expected
    with pytest.raises(InputError, match=r"trace\.csv: holds 2 requests within the limits, fewer than 3"):
        from_trace(file, 3, limits=Limits(total_len=49))


def test_the_draw_follows_the_seed_and_keeps_pairs(tmp_path: Path) -> None:
    rows = "".join(f"{n},{1000 + n}\n" for n in range(1, 500))
    file = write(tmp_path, "ContextTokens,GeneratedTokens\n" + rows)
    first, again, other = (from_trace(file, 50, seed) for seed in (1, 1, 2))
    assert first.input_lens.tolist() == again.input_lens.tolist() != other.input_lens.tolist()
    assert len(set(first.input_lens.tolist())) == 50
    assert (first.output_lens - first.input_lens == 1000).all()
    assert first.name == "trace.csv"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: must name the columns ContextTokens and GeneratedTokens; ContextTokens is missing"),
        ("ContextTokens,Generated\n1,2\n", "line 1: must name .*; GeneratedTokens is missing"),
        ("ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("ContextTokens,GeneratedTokens\n1,2\n3\n", "line 3: has 1 fields, too few for GeneratedTokens"),
        ("ContextTokens,GeneratedTokens\n1,2\n\n3,x\n", "line 4: GeneratedTokens must be a number .*not 'x'"),
        ("ContextTokens,GeneratedTokens\n0,2\n", "line 2: ContextTokens must be a number of tokens, at least 1"),
        ("ContextTokens,GeneratedTokens\n-4,2\n", "line 2: ContextTokens .*not '-4'"),
        ("ContextTokens,GeneratedTokens\n1.5,2\n", "line 2: ContextTokens .*not '1.5'"),
        ("ContextTokens,GeneratedTokens\n²,2\n", "line 2: ContextTokens .*not '²'"),
        (f"ContextTokens,GeneratedTokens\n{'9' * 5000},2\n", "line 2: ContextTokens .*999…"),
    ],
)
def test_a_wrong_line_is_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as error:
        read_trace(write(tmp_path, text))
    assert str(error.value).startswith(str(tmp_path / "trace.csv"))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not valid UTF-8"):
        read_trace(binary)
