"""One step as an engine under full load runs it, again and again: what plans are compared by.

The batch is made by hand: sequences that decode at contexts spread evenly over their output, and prompts in the
middle of being read. Every replay does the same work on the same pages.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nf.bench.measure import RUN_SECONDS, WARM_SECONDS, Measurement
from nf.bench.power import PowerMeter
from nf.executors.base import Executor, StepHandle
from nf.scheduler.batch import Batch, PromptLogprobsBatch, SamplingBatch

IN_FLIGHT = 2  # steps enqueued ahead, as the engine does
TOKEN_IDS = 256
MIN_STEPS = 4


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of constant lengths, as many at a time as keep a dense batch full.

    Args:
        dense_batch_size: tokens of a step.
        input_len, output_len: of every request.
        decode_only: no more prompts come.
    """

    dense_batch_size: int
    input_len: int
    output_len: int
    decode_only: bool = False

    @property
    def num_decode(self) -> int:
        """Sequences that decode: a request needs ``input_len`` prefill rows and ``output_len − 1`` decode rows."""
        if self.decode_only:
            return self.dense_batch_size
        decodes = self.output_len - 1
        return round(self.dense_batch_size * decodes / (self.input_len + decodes))

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache during such a step."""
        return sum(self.kv_lens())

    def kv_lens(self) -> list[int]:
        """Length of each sequence once the step is done: those that decode first, then prompts."""
        count = self.num_decode
        decodes = [self.input_len + 1 + (i * self.output_len) // count for i in range(count)]
        return decodes + [start + new for start, new in self.chunks()]

    def chunks(self) -> list[tuple[int, int]]:
        """(tokens cached before, new tokens) of each prompt in the step: the end of one, whole ones, a beginning."""
        left = self.dense_batch_size - self.num_decode
        first = min(left, self.input_len // 2)
        chunks = [(self.input_len - first, first)] if first else []
        left -= first
        while left:
            new = min(left, self.input_len)
            chunks.append((0, new))
            left -= new
        return chunks

    def batch(self, page_size: int, num_pages: int | None = None) -> Batch:
        """The step; see ``step_batch``."""
        lens = self.kv_lens()
        new = [1] * self.num_decode + [tokens for _, tokens in self.chunks()]
        return step_batch(self.num_decode, new, lens, page_size, num_pages)


def step_batch(
    num_decode: int, new: Sequence[int], lens: Sequence[int], page_size: int, num_pages: int | None = None
) -> Batch:
    """A step whose sequences take ``new`` tokens each and are ``lens`` long then; the first ``num_decode`` decode.

    Each has pages of its own, in no order, as in a cache that has been used for a while. If only ``num_pages`` exist,
    they are taken again and again, which makes the step's results worthless but not its work. Token ids are small ones,
    which every vocabulary has.
    """
    count, new_tokens, kv_lens = num_decode, np.array(new, np.int64), np.array(lens, np.int64)
    seqs = len(new_tokens)
    ends = np.cumsum(new_tokens)
    pages = -(-kv_lens // page_size)
    rows = np.concatenate([np.arange(count), ends[count:] - 1]).astype(np.int32)
    generator = np.random.default_rng(0)
    positions = np.concatenate([np.arange(n - t, n) for n, t in zip(kv_lens, new_tokens, strict=True)])
    int32 = np.int32
    total = int(pages.sum())
    return Batch(
        step=0,
        num_decode=count,
        token_ids=generator.integers(0, TOKEN_IDS, int(ends[-1])).astype(int32),
        token_slots=np.repeat(np.arange(seqs), new_tokens).astype(int32),
        positions=positions.astype(int32),
        slots=np.arange(seqs, dtype=int32),
        qo_indptr=np.concatenate([[0], ends]).astype(int32),
        kv_lens=kv_lens.astype(int32),
        kv_indptr=np.concatenate([[0], np.cumsum(pages)]).astype(int32),
        kv_indices=(generator.permutation(total) % (num_pages or total)).astype(int32),
        last_page_len=(kv_lens - (pages - 1) * page_size).astype(int32),
        sampling=_greedy(rows, kv_lens.astype(int32)),
        prompt_logprobs=PromptLogprobsBatch(*(np.zeros(0, int32) for _ in range(4))),
        swap_out=np.zeros((0, 2), int32),
        swap_in=np.zeros((0, 2), int32),
        page_copies=np.zeros((0, 2), int32),
        forks=np.zeros((0, 3), int32),
    )


def measure_step(
    executor: Executor, batch: Batch, *, warm: float = WARM_SECONDS, run: float = RUN_SECONDS, device: int = 0
) -> Measurement:
    """Mean time and energy of a step, with as many steps enqueued ahead as the engine enqueues."""
    _replay(executor, batch, warm)  # by the clock: the first step takes longer than any other
    with PowerMeter(device) as meter:
        seconds = _replay(executor, batch, run)
    return Measurement(seconds, seconds * meter.watts)


def _replay(executor: Executor, batch: Batch, at_least: float) -> float:
    """Seconds per step, of so many steps as take ``at_least`` seconds together, four at least."""
    started = time.perf_counter()
    handles: deque[StepHandle] = deque()
    count = 0
    while count < MIN_STEPS or time.perf_counter() - started < at_least:
        handles.append(executor.submit(batch))
        count += 1
        if len(handles) > IN_FLIGHT:
            handles.popleft().result()
    for handle in handles:
        handle.result()
    return (time.perf_counter() - started) / count


def _greedy(rows: np.ndarray, positions: np.ndarray) -> SamplingBatch:
    """Greedy sampling of one token per sequence."""
    count = len(rows)

    def ints(value: int = 0, size: int = count) -> np.ndarray:
        return np.full(size, value, np.int32)

    def floats(value: float = 0.0, size: int = count) -> np.ndarray:
        return np.full(size, value, np.float32)

    return SamplingBatch(
        rows=rows,
        slots=np.arange(count, dtype=np.int32),
        positions=positions,
        prompt_lens=positions,
        temperature=floats(),
        top_k=ints(),
        top_p=floats(1.0),
        min_p=floats(),
        presence_penalty=floats(),
        frequency_penalty=floats(),
        repetition_penalty=floats(1.0),
        seeds=np.zeros(count, np.uint64),
        sample_index=ints(),
        logprobs=ints(-1),
        bias_indptr=ints(size=count + 1),
        bias_ids=ints(size=0),
        bias_values=floats(size=0),
        allowed_indptr=ints(size=count + 1),
        allowed_ids=ints(size=0),
        bad_words_indptr=ints(size=count + 1),
        bad_words_token_indptr=ints(size=1),
        bad_words_ids=ints(size=0),
    )
