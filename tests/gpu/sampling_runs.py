"""Launches of the sampling kernels on rows made here, and checks of every row against float64."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest

from nf.executors.cpu_sampling import sample
from nf.executors.logit_edits import edit_logits
from nf.executors.philox import noise_of_all
from nf.kernels import sampling
from nf.kernels.load import KernelLoader
from nf.kernels.registry import artifacts
from nf.scheduler.batch import SamplingBatch

torch = pytest.importorskip("torch")

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
    token_ids: Any
    logprobs: Any
    ranks: Any
    top_ids: Any
    top_logprobs: Any
    tokens: Any


def device(values: Any) -> Any:
    """On the device; never empty, so that the pointer is one."""
    values = values.view(np.int64) if values.dtype == np.uint64 else values
    return torch.from_numpy(values if len(values) else np.zeros(1, values.dtype)).cuda()


def outputs(count: int) -> list[Any]:
    """Poisoned: logprobs, ranks, top_ids, top_logprobs."""
    return [
        torch.full((count,), NAN, device="cuda"),
        torch.full((count,), -7, device="cuda", dtype=torch.int32),
        torch.full((count, 20), -7, device="cuda", dtype=torch.int32),
        torch.full((count, 20), NAN, device="cuda"),
    ]


def padded(logits: Any, dtype: str) -> Any:
    """On the device, with infinities in what is beyond the vocabulary."""
    rows, vocab_size = logits.shape
    wide = torch.full((rows, -(-vocab_size // 8) * 8 + 8), INF, device="cuda")
    wide[:, :vocab_size] = torch.from_numpy(logits).cuda()
    return wide.bfloat16() if dtype == "bf16" else wide


class Launch:
    """A launch on poisoned outputs; ``num_samples`` is the device's count of rows."""

    def __init__(self, logits: Any, rows: SamplingBatch, tokens: Any, dtype: str, sms: int) -> None:
        self.wide, self.tokens = padded(logits, dtype), torch.from_numpy(tokens).cuda()
        total, vocab_size = logits.shape
        self.capacity = total
        self.kernel = sampling.Sampler(
            KernelLoader(artifacts(sampling.sources(), "sm_90a")),
            dtype,
            vocab_size=vocab_size,
            tokens_stride=tokens.shape[1],
            sms=sms,
        )
        self.num_samples = device(np.array([total], np.int32))
        names = [field.name for field in fields(SamplingBatch) if field.name != "rows"]
        self.arrays = {name: device(getattr(rows, name)) for name in names} | {"num_samples": self.num_samples}
        self.workspace = torch.full((self.kernel.workspace_bytes,), 0xFF, device="cuda", dtype=torch.uint8)
        self.workspace[:256] = 0
        self.chosen, self.out = torch.full((total,), -7, device="cuda", dtype=torch.int32), outputs(total)

    def __call__(self) -> None:
        self.kernel(
            logits=self.wide.data_ptr(), stride=self.wide.shape[1], tokens=self.tokens.data_ptr(),
            arrays=sampling.SamplingArrays(**{name: array.data_ptr() for name, array in self.arrays.items()}),
            token_ids=self.chosen.data_ptr(), workspace=self.workspace.data_ptr(),
            logprobs=sampling.LogprobArrays(*(array.data_ptr() for array in self.out)),
            capacity=self.capacity, stream=torch.cuda.current_stream().cuda_stream, pdl=True,
        )  # fmt: skip

    def result(self) -> Result:
        assert not self.workspace[:256].any()
        return Result(*(array.cpu().numpy() for array in (self.chosen, *self.out, self.tokens)))


def run(logits: Any, rows: SamplingBatch, tokens: Any, dtype: str, *, sms: int = 132) -> Result:
    launch = Launch(logits, rows, tokens, dtype, sms)
    launch()
    launch()  # finds the counters as the first one did
    return launch.result()


def seen(logits: Any, dtype: str) -> Any:
    """What the kernel sees of the logits, float32."""
    return torch.from_numpy(logits).bfloat16().float().numpy() if dtype == "bf16" else logits


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


def check(logits: Any, rows: SamplingBatch, dtype: str, *, tokens: Any = None, sms: int = 132) -> Result:
    if tokens is None:
        tokens = np.zeros((len(logits), LENGTH), np.int32)
    found = run(logits, rows, tokens, dtype, sms=sms)
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
    return found


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
