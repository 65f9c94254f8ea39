"""Rows to sample from, and checks of every row that was sampled against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from nf.executors.cpu_sampling import sample
from nf.executors.logit_edits import edit_logits
from nf.executors.philox import noise_of_all
from nf.scheduler.batch import SamplingBatch

LENGTH = 600  # of a row of the token buffer
SCORE = 2e-4  # by how much float32 may prefer another token
SHARE = 1e-5  # by how much it may misjudge a share of weight, relative
NAN, INF = float("nan"), float("inf")


def batch(count: int, **columns: Any) -> SamplingBatch:
    """Rows greedy unless said otherwise; lists per row as bias=[{id: value}], allowed=[[id]], words=[[[id]]]."""
    bias, allowed, words = (columns.pop(name, [[]] * count) for name in ("bias", "allowed", "words"))
    values = {
        "rows": np.arange(count), "slots": np.arange(count), "positions": np.full(count, 5), "prompt_lens": 2,
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "seeds": np.arange(count) + 12345, "sample_index": 0, "logprobs": -1,
    } | columns  # fmt: skip
    floats = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    types = dict.fromkeys(floats, np.float32) | {"seeds": np.uint64}

    def flat(items: Any, dtype: type = np.int32) -> Any:
        return np.array(list(items), dtype)

    def indptr(lists: Any) -> Any:
        return np.concatenate([[0], np.cumsum([len(own) for own in lists])]).astype(np.int32)

    return SamplingBatch(
        **{n: np.broadcast_to(np.asarray(v, types.get(n, np.int32)), (count,)).copy() for n, v in values.items()},
        bias_indptr=indptr(bias),
        bias_ids=flat(i for own in bias for i in own),
        bias_values=flat((v for own in bias if own for v in own.values()), np.float32),
        allowed_indptr=indptr(allowed),
        allowed_ids=flat(i for own in allowed for i in own),
        bad_words_indptr=indptr(words),
        bad_words_token_indptr=indptr([word for own in words for word in own]),
        bad_words_ids=flat(i for own in words for word in own for i in word),
    )


@dataclass
class Result:
    """What a launch wrote: poisoned (−7, NaN) where it wrote nothing."""

    token_ids: Any
    logprobs: Any
    ranks: Any
    top_ids: Any
    top_logprobs: Any
    tokens: Any


@dataclass
class PromptRows:
    """Rows [start, stop) of which ``count`` [1] there are, what was written there, and how many log-probabilities of
    each are wanted."""

    count: Any
    start: int
    stop: int
    targets: Any
    wanted: Any


def poisoned(count: int) -> list[Any]:
    """logprobs, ranks, top_ids, top_logprobs before a launch."""
    shapes = (((count,), NAN), ((count,), -7), ((count, 20), -7), ((count, 20), NAN))
    return [np.full(shape, value, np.int32 if value == -7 else np.float32) for shape, value in shapes]


def padded(logits: Any, dtype: str) -> Any:
    """With infinities in what is beyond the vocabulary; bf16 where the kernel has that."""
    rows, vocab_size = logits.shape
    wide = np.full((rows, -(-vocab_size // 8) * 8 + 8), INF, np.float32)
    wide[:, :vocab_size] = logits
    return wide.astype(ml_dtypes.bfloat16) if dtype == "bf16" else wide


def seen(logits: Any, dtype: str) -> Any:
    """What the kernel sees of the logits, float32."""
    return logits.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bf16" else logits


def check_token(x: Any, rows: SamplingBatch, i: int, token: int) -> None:
    """Of one row with edited logits ``x`` [vocab_size]."""
    x = x.astype(np.float64)
    top = x.max()
    if not np.isfinite(top):
        assert token == -1
        return
    if rows.temperature[i] == 0:
        assert token == x.argmax()
        return
    with np.errstate(all="ignore"):
        scaled = (x - top) / np.float64(rows.temperature[i])
        order = np.lexsort((np.arange(len(x)), -scaled))
        weight = np.exp(scaled[order])
        most = int(rows.top_k[i]) or len(x)

        def kept(slack: float) -> Any:
            """With limits tightened (slack < 0) or loosened."""
            own = order[: max(1, min(most, np.count_nonzero(weight >= rows.min_p[i] * (1 - slack))))]
            mass = weight[: len(own)].cumsum()
            if rows.top_p[i] < 1:
                own = own[: 1 + np.count_nonzero(mass < rows.top_p[i] * mass[-1] * (1 + slack))]
            return own

        noise = noise_of_all(rows.seeds[i : i + 1], rows.positions[i : i + 1], rows.sample_index[i : i + 1], len(x))
        score = scaled + noise[0].astype(np.float64)
    assert token in kept(SHARE)
    assert score[token] >= score[kept(-SHARE)].max() - SCORE


def check_rows(found: Result, logits: Any, rows: SamplingBatch, dtype: str, tokens: Any) -> None:
    """Every token and log-probability, and that nothing else was written."""
    x = seen(logits, dtype)
    sound = np.isfinite(x.max(axis=1))
    with np.errstate(all="ignore"):
        edited = edit_logits(x, rows, tokens)
        same = found.token_ids == sample(x, rows, tokens)
    for i, token in enumerate(found.token_ids):
        check_token(edited[i] if sound[i] else np.full(4, NAN), rows, i, token)
        if rows.logprobs[i] >= 0:
            check_logprobs(x[i], max(token, 0), rows.logprobs[i], found, i)
        else:
            assert np.isnan(found.logprobs[i])
            assert (found.top_ids[i] == -7).all()
    expected = tokens.copy()
    expected[rows.slots, rows.positions] = np.maximum(found.token_ids, 0)
    assert (found.tokens == expected).all()
    assert same.mean() >= 0.97  # the CPU's choices, but for races closer than rounding


def check_logprobs(x: Any, chosen: int, count: int, found: Any, i: int) -> None:
    with np.errstate(all="ignore"):
        x = np.where(np.isnan(x), -INF, x).astype(np.float64)
        logprobs = x - (x.max() + np.log(np.exp(x - x.max()).sum()))
    count = min(count, len(x))
    order = np.lexsort((np.arange(len(x)), -x))[:count]
    close = {"rtol": 3e-6, "atol": 3e-6, "equal_nan": True}
    np.testing.assert_allclose(found.logprobs[i], logprobs[chosen], **close)
    assert found.ranks[i] == 1 + np.count_nonzero(x > x[chosen])
    if count:
        assert found.top_ids[i, :count].tolist() == order.tolist()
        np.testing.assert_allclose(found.top_logprobs[i, :count], logprobs[order], **close)
        assert (found.top_ids[i, count:] == -1).all()
        assert (found.top_logprobs[i, count:] == -INF).all()


def shaped(rng: Any, kind: str, rows: int, vocab_size: int) -> Any:
    x = rng.standard_normal((rows, vocab_size)) * rng.choice([0.3, 1.0, 4.0], (rows, 1))
    if kind == "peaked":
        x[np.arange(rows), rng.integers(0, vocab_size, rows)] += rng.choice([8, 20, 60], rows)
    if kind == "sorted":
        x = -np.sort(-x, axis=1)
    if kind == "ties":
        x = np.round(x * 2)
    if kind == "zipf":
        x = -3 * np.log(1 + rng.permuted(np.tile(np.arange(vocab_size), (rows, 1)), axis=1)) + 0.01 * x
    return x.astype(np.float32)
