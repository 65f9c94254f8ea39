"""Sampling against a plain float64 reference: one row at a time, sets and loops, the same noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from executor_cases import sampling_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.executors.cpu_logprobs import top_logprobs
from nf.executors.cpu_sampling import sample
from nf.executors.philox import noise_of

VOCAB = 50
SEEN = 30  # tokens of history in the token buffer


def reference(logits: np.ndarray, history: list[int], row: dict) -> dict[int, float]:
    """Token id → logit / temperature of the tokens that may be sampled; greedy rows have one."""
    x = {t: float(v) for t, v in enumerate(logits)}
    if row["allowed"]:
        x = {t: v for t, v in x.items() if t in row["allowed"]}
    for word in row["words"]:
        if history[len(history) - len(word) + 1 :] == word[:-1]:
            x.pop(word[-1], None)
    for t, v in row["bias"].items():
        if t in x:
            x[t] += v
    output = history[row["prompt_lens"] :]
    for t in x:
        if t in history:
            x[t] = x[t] / row["repetition_penalty"] if x[t] > 0 else x[t] * row["repetition_penalty"]
        x[t] -= row["frequency_penalty"] * output.count(t) + row["presence_penalty"] * (t in output)
    x = {t: v for t, v in x.items() if v > -math.inf}
    order = sorted(x, key=lambda t: (-x[t], t))
    if row["temperature"] == 0:
        return {t: x[t] for t in order[:1]}
    scaled = {t: x[t] / row["temperature"] for t in order}
    weight = {t: math.exp(scaled[t] - scaled[order[0]]) for t in order}
    order = [t for t in order if weight[t] >= row["min_p"]]
    if row["top_k"]:
        order = order[: row["top_k"]]
    if row["top_p"] < 1:
        total, mass, kept = sum(weight[t] for t in order), 0.0, []
        for t in order:
            kept.append(t)
            mass += weight[t]
            if mass >= row["top_p"] * total:
                break
        order = kept
    return {t: scaled[t] for t in order}


def expected_token(scaled: dict[int, float], row: dict, position: int) -> tuple[int, float]:
    """Gumbel-max over the survivors, and by how much the winner wins."""
    if not scaled:
        return -1, math.inf
    ids = np.array(list(scaled))
    count = len(ids)
    noise = noise_of(
        ids,
        np.full(count, row["seeds"], np.uint64),
        np.full(count, position, np.int32),
        np.full(count, row["sample_index"], np.int32),
    )
    scores = np.array(list(scaled.values())) + noise
    best = np.sort(scores)
    return int(ids[scores.argmax()]), best[-1] - best[-2] if count > 1 else math.inf


def lists(element: st.SearchStrategy, most: int) -> st.SearchStrategy:
    return st.just([]) | st.lists(element, min_size=1, max_size=most)


TOKEN = st.integers(0, VOCAB - 1)
ROW = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.25, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 3, 20, VOCAB, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.03, 0.4]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.7, -1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.5]),
        "seeds": st.integers(0, 2**64 - 1),
        "sample_index": st.integers(0, 127),
        "prompt_lens": st.integers(0, SEEN),
        "bias": st.just({}) | st.dictionaries(TOKEN, st.sampled_from([-math.inf, -3.0, 5.5]), max_size=5),
        "allowed": lists(TOKEN, 12),
        "words": lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), 4),
    }
)


def batch_of(rows: list[dict], positions: list[int]):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["seeds"] = np.array(columns["seeds"], np.uint64)
    return sampling_batch(list(range(len(rows))), list(range(len(rows))), positions, **columns)


@settings(max_examples=120, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6), st.integers(0, 2**32))
def test_tokens_are_those_of_a_plain_reference(rows: list[dict], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(rows), VOCAB)).astype(np.float32)
    tokens = rng.integers(0, 5, (len(rows), SEEN + 1)).astype(np.int32)  # few ids, so that words and counts occur
    positions = rng.integers(1, SEEN + 1, len(rows)).tolist()
    unchanged = logits.copy()
    with np.errstate(all="ignore"):
        found = sample(logits, batch_of(rows, positions), tokens)
    np.testing.assert_array_equal(logits, unchanged)
    for i, row in enumerate(rows):
        survivors = reference(logits[i], tokens[i, : positions[i]].tolist(), row)
        token, margin = expected_token(survivors, row, positions[i])
        if margin > 1e-4:  # float32 may decide a closer race otherwise
            assert found[i] == token
        with np.errstate(all="ignore"):  # alone: the very same token
            assert sample(logits[i : i + 1], batch_of([row], [positions[i]]), tokens[i : i + 1])[0] == found[i]


def draws(logits: list[float], count: int, **columns) -> np.ndarray:
    """Frequencies of the tokens over ``count`` positions of one seed."""
    wide = np.tile(np.array(logits, np.float32), (count, 1))
    slots, positions = [0] * count, list(range(count))
    columns = {"temperature": 1.0, "seeds": 77, "prompt_lens": count} | columns
    batch = sampling_batch(slots, slots, positions, **columns)
    with np.errstate(all="ignore"):
        found = sample(wide, batch, np.zeros((1, count), np.int32))
    return np.bincount(found, minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "kept"), [(0, 40), (5, 5)])  # noise for whole rows, noise for few ids
def test_frequencies_follow_the_softmax(temperature: float, top_k: int, kept: int) -> None:
    rng = np.random.default_rng(3)
    logits = np.sort(rng.normal(0, 1.5, 40))[::-1]
    count = 20_000
    p = np.exp(logits[:kept] / temperature)
    expected = count * p / p.sum()
    found = draws(logits.tolist(), count, temperature=temperature, top_k=top_k)
    assert found[kept:].sum() == 0
    statistic = ((found[:kept] - expected) ** 2 / expected).sum()
    assert abs(statistic - (kept - 1)) < 5 * math.sqrt(2 * (kept - 1))


def test_seeds_positions_and_continuations_are_independent_draws() -> None:
    logits = np.zeros((3000, 16), np.float32)
    many, one = np.arange(3000), np.zeros(3000, int)
    zero = [0] * 3000
    for seeds, positions, samples in ((many, one, one), (one, many, one), (one, one, many)):
        batch = sampling_batch(zero, zero, positions.tolist(), temperature=1.0, seeds=seeds, sample_index=samples)
        found = sample(logits, batch, np.zeros((1, 3000), np.int32))
        counts = np.bincount(found[:-1] * 16 + found[1:], minlength=256)  # neighbouring pairs
        statistic = ((counts - 2999 / 256) ** 2 / (2999 / 256)).sum()
        assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)


def kept_by(logits: list[float], **columns) -> set[int]:
    return set(np.flatnonzero(draws(logits, 3000, **columns)).tolist())


def test_filters_keep_exactly_what_they_say() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    assert kept_by(logits) == {0, 1, 2, 3}
    assert kept_by(logits, top_p=0.499) == {0}
    assert kept_by(logits, top_p=0.501) == {0, 1}
    assert kept_by(logits, top_p=0.81) == {0, 1, 2}
    assert kept_by(logits, top_p=1e-6) == {0}
    assert kept_by([0.0, 0.0], top_p=0.5) == {0}  # exactly enough
    assert kept_by(logits, min_p=0.29) == {0, 1, 2}
    assert kept_by(logits, min_p=0.31) == {0, 1}
    assert kept_by(logits, min_p=1.0) == {0}
    assert kept_by(logits, top_k=2) == {0, 1}
    assert kept_by(logits, top_k=2, top_p=0.6) == {0}  # of what top-k left, 0.5 / 0.8 is enough
    assert kept_by(logits, min_p=0.31, top_p=0.6) == {0}  # likewise of what min-p left
    assert kept_by(logits, temperature=2.0, min_p=0.5) == {0, 1, 2}  # after temperature: √0.3 is above half of √0.5


def test_ties_go_to_the_lowest_ids() -> None:
    flat = [1.0, 3.0, 3.0, 3.0, 0.0]
    assert kept_by(flat, temperature=0.0) == {1}
    assert kept_by(flat, top_k=1) == {1}
    assert kept_by(flat, top_k=2) == {1, 2}
    assert kept_by(flat, top_p=0.5) == {1, 2}
    assert kept_by(flat, min_p=1.0) == {1, 2, 3}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert kept_by([1e4, 1.2e4, -3e38, 0.0], temperature=1e-38) == {1}


def choose(logits: list[float], history: list[int], **columns) -> int:
    tokens = np.array([[*history, 0]], np.int32)
    batch = sampling_batch([0], [0], [len(history)], **columns)
    with np.errstate(all="ignore"):
        return int(sample(np.array([logits], np.float32), batch, tokens)[0])


def test_penalties_by_hand() -> None:
    """Prompt [0], output [1, 1, 2]."""
    history, prompt = [0, 1, 1, 2], {"prompt_lens": 1}
    assert choose([2, 1.9, 1.8, 1], history, **prompt) == 0
    assert choose([2, 1.9, 1.8, 1], history, repetition_penalty=2.0, **prompt) == 0  # 1, .95, .9 against 1: a tie
    assert choose([2, 1.9, 1.8, 1.01], history, repetition_penalty=2.0, **prompt) == 3  # the prompt counts
    assert choose([-1, -2, -3, -1.5], history, repetition_penalty=1.6, **prompt) == 3  # −1.6 against −1.5
    assert choose([1, 2, 1.8, 0], history, presence_penalty=0.9, **prompt) == 1  # 1.1 against 1 of the prompt
    assert choose([1, 2, 1.8, 0], history, presence_penalty=1.1, **prompt) == 0
    assert choose([1, 3, 1.8, 0], history, frequency_penalty=0.7, **prompt) == 1  # 3 − 1.4 against 1.1
    assert choose([1, 3, 2.4, 0], history, frequency_penalty=0.9, **prompt) == 2  # 1.2 against 1.5
    assert choose([1, 2, 1.8, 0], history, presence_penalty=-0.3, frequency_penalty=-0.3, **prompt) == 1


def test_bad_words_look_back_over_prompt_and_output() -> None:
    logits = [0, 5, 4, 3]
    assert choose(logits, [2, 3], words=[[[1]]]) == 2
    assert choose(logits, [2, 3], words=[[[2, 3, 1]]]) == 2
    assert choose(logits, [2, 3], words=[[[3, 3, 1], [2, 1]]]) == 1
    assert choose(logits, [3], words=[[[2, 3, 1]]]) == 1  # longer than the history
    assert choose(logits, [3], words=[[[1], [3, 2]]]) == 3


def test_bias_and_allowed_ids() -> None:
    assert choose([0, 5, 4, 3], [0], bias=[{3: 2.5}]) == 3
    assert choose([0, 5, 4, 3], [0], bias=[{1: -math.inf}]) == 2
    assert choose([0, 5, 4, 3], [0], allowed=[[3, 0]]) == 3
    assert choose([0, 5, 4, 3], [0], allowed=[[3, 0]], bias=[{1: 100.0}]) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_choice_yield_minus_one_and_disturb_no_other(temperature: float) -> None:
    good = [0.0, 1.0, 2.0, 1.0]
    logits = np.array(
        [good, [0, np.nan, 2, 1], good, [0, np.inf, 2, 1], good, [-np.inf] * 4, good, [0, np.nan, 2, 1]], np.float32
    )
    rows = list(range(8))
    allowed = [[]] * 6 + [[2], [2]]  # in the last row what is allowed is no NaN, but the row is still broken
    batch = sampling_batch(rows, rows, [5] * 8, temperature=temperature, seeds=3, allowed=allowed)
    with np.errstate(all="ignore"):
        found = sample(logits, batch, np.zeros((8, 6), np.int32)).tolist()
    alone = sample(logits[:1], sampling_batch([0], [0], [5], temperature=temperature, seeds=3), np.zeros((1, 6), int))
    assert found == [alone[0], -1, alone[0], -1, alone[0], -1, 2, -1]
    assert choose(good, [0], temperature=temperature, allowed=[[1]], words=[[[1]]]) == -1


def test_logprobs_of_ties_minus_infinity_and_nan() -> None:
    logits = np.array([[1, 3, 3, -np.inf, 3], [np.nan, 0, 0, 0, 0], [np.nan] * 5], np.float32)
    with np.errstate(all="ignore"):
        found = top_logprobs(logits, np.array([2, 1, 0], np.int32), 3)
    assert found.top_ids.tolist() == [[1, 2, 4], [1, 2, 3], [0, 1, 2]]
    assert found.ranks.tolist() == [1, 1, 1]
    np.testing.assert_allclose(found.logprobs[0], 3 - math.log(3 * math.exp(3) + math.e), rtol=1e-6)
    assert np.isnan(found.logprobs[2])
    none = top_logprobs(logits[:1], np.array([3], np.int32), 0)
    assert none.top_ids.shape == (1, 0)
    assert none.logprobs[0] == -np.inf
    assert none.ranks[0] == 5
    assert top_logprobs(logits[:1], np.array([3], np.int32), 20).top_ids.tolist() == [[1, 2, 4, 0, 3]]
