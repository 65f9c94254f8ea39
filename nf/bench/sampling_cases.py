"""Sampling of 1024 rows of 128,256 normal logits against one streaming read of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nf.bench.kernels import Bench, Row, pointers
from nf.bench.measure import Call, measure
from nf.kernels import sampling

COUNT, VOCAB = 1024, 128256
GREEDY_FLOOR, DRAWN_FLOOR = 1 / 1.3, 1 / 4
DRAWS = 8  # with seeds of their own: a single row can make a launch a fifth longer, where its first pass does not tell
CASES: tuple[tuple[str, dict[str, float], float | None], ...] = (
    ("greedy, logprob", {"logprobs": 0}, GREEDY_FLOOR),
    ("greedy, top 20 logprobs", {"logprobs": 20}, None),
    ("temperature 1", {"temperature": 1.0}, None),
    ("temperature 1, top-k 50", {"temperature": 1.0, "top_k": 50}, DRAWN_FLOOR),
    ("temperature 1, top-p 0.9", {"temperature": 1.0, "top_p": 0.9}, DRAWN_FLOOR),
    ("temperature 0.7, top-p 0.9", {"temperature": 0.7, "top_p": 0.9}, DRAWN_FLOOR),
    ("temperature 1, top-k 50, top-p 0.9", {"temperature": 1.0, "top_k": 50, "top_p": 0.9}, DRAWN_FLOOR),
    ("temperature 1, penalties", {"temperature": 1.0, "presence_penalty": 0.5}, None),
)


def rows(bench: Bench) -> Iterator[Row]:
    for dtype in sampling.LOGITS_TYPES:
        logits = random_logits(bench, dtype, 1.0)
        for case, columns, floor in CASES:
            yield _row(bench, dtype, case, columns, floor, logits)
        peaked = random_logits(bench, dtype, 3.0)
        case = "logits of deviation 3, temperature 1, top-p 0.9"
        yield _row(bench, dtype, case, {"temperature": 1.0, "top_p": 0.9}, DRAWN_FLOOR, peaked)


def random_logits(bench: Bench, dtype: sampling.LogitsType, deviation: float) -> Any:
    import cupy

    if dtype == "bf16":
        return bench.normal(COUNT, VOCAB, scale=deviation)
    return cupy.random.standard_normal((COUNT, VOCAB), dtype=cupy.float32) * cupy.float32(deviation)


def _row(
    bench: Bench, dtype: sampling.LogitsType, case: str, columns: dict[str, float], floor: float | None, logits: Any
) -> Row:
    measured = measure([call(bench, dtype, columns, logits, draw) for draw in range(DRAWS)])
    score = logits.nbytes / measured.seconds / bench.read_rate()
    return Row("sampling", f"{dtype}, {case}", measured, logits.nbytes, "B", "streaming read", score, floor)


def call(bench: Bench, dtype: sampling.LogitsType, columns: dict[str, float], logits: Any, draw: int = 0) -> Call:
    """A launch; ``draw`` says which seeds."""
    import cupy

    length = 1024
    kernel = sampling.Sampler(bench.loader, dtype, vocab_size=VOCAB, tokens_stride=length + 1, sms=bench.sms)
    values: dict[str, Any] = {
        "slots": np.arange(COUNT), "positions": length, "prompt_lens": length // 2, "temperature": 0.0, "top_k": 0,
        "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "sample_index": 0, "logprobs": -1,
    }  # fmt: skip
    values |= columns
    floats = {name for name in values if name.endswith(("_p", "penalty", "temperature"))}
    arrays = {
        name: cupy.asarray(np.broadcast_to(value, COUNT).astype(np.float32 if name in floats else np.int32))
        for name, value in values.items()
    }
    none = cupy.zeros(COUNT + 1, cupy.int32)
    arrays |= dict.fromkeys(("bias_indptr", "allowed_indptr", "bad_words_indptr", "bad_words_token_indptr"), none)
    arrays |= dict.fromkeys(("bias_ids", "bias_values", "allowed_ids", "bad_words_ids"), none)
    seeds = cupy.arange(draw * COUNT, (draw + 1) * COUNT, dtype=cupy.uint64)
    arrays |= {"num_samples": cupy.full(1, COUNT, cupy.int32), "seeds": seeds}
    tokens = cupy.random.randint(0, VOCAB, (COUNT, length + 1)).astype(cupy.int32)
    out = [cupy.empty(COUNT * width, cupy.float32) for width in (1, 1, 20, 20)]
    chosen, workspace = cupy.empty(COUNT, cupy.int32), cupy.zeros(kernel.workspace_bytes, cupy.uint8)
    of_batch = sampling.SamplingArrays(**{name: array.data.ptr for name, array in arrays.items()})
    report = sampling.LogprobArrays(*pointers(*out))
    logits_at, tokens_at, chosen_at, workspace_at = pointers(logits, tokens, chosen, workspace)

    def launch(stream: int, _keep: Any = (logits, arrays, tokens, out, chosen, workspace)) -> None:
        kernel.launch(
            logits=logits_at, stride=VOCAB, arrays=of_batch, tokens=tokens_at, token_ids=chosen_at,
            logprobs=report, workspace=workspace_at, capacity=COUNT, stream=stream, pdl=True,
        )  # fmt: skip

    return launch
