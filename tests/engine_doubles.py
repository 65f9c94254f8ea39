"""An executor that needs no model, a tokenizer of bytes, and an engine made of them."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from nf.config import EngineConfig, ModelConfig
from nf.executors.base import StepResult, TopLogprobs
from nf.inputs import Inputs
from nf.limits import Limits
from nf.loading import Loaded
from nf.request import Request
from nf.sampling_params import SamplingParams
from nf.scheduler.batch import Batch
from nf.scheduler.scheduler import Scheduler, SchedulerConfig
from nf.text.tokenizer import Tokenizer

EOS = 256
VOCAB_SIZE = 257
MAX_MODEL_LEN = 64

NextToken = Callable[[int, int, int], int]


def hashed_token(seed: int, index: int, position: int) -> int:
    """A printable byte that depends on everything it may depend on, and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{index}/{position}".encode(), digest_size=2).digest()
    return 33 + int.from_bytes(digest, "little") % 90


class RecordedFuture(Future[StepResult]):
    """Says when somebody begins to wait for it."""

    def __init__(self, step: int, events: list[tuple[str, int]]) -> None:
        super().__init__()
        self._step, self._events = step, events

    def add_done_callback(self, fn: Any) -> None:
        self._events.append(("await", self._step))
        super().add_done_callback(fn)


class FakeExecutor:
    """Samples ``next_token(seed, index, position)``. ``events`` is what happened, in order.

    Args:
        manual: steps wait until ``run`` lets them go.
        fail_at: this step, and all after it, fail.
    """

    page_size, num_pages, num_host_pages = 0, 0, 0  # the scheduler's matter here

    def __init__(
        self, next_token: NextToken = hashed_token, *, manual: bool = False, fail_at: int | None = None
    ) -> None:
        self.events: list[tuple[str, int]] = []
        self.batches: list[Batch] = []
        self.num_closes = 0
        self._next_token = next_token
        self._fail_at = fail_at
        self._queue: queue.Queue[tuple[Batch, RecordedFuture] | None] = queue.Queue()
        self._permits = threading.Semaphore(0) if manual else None
        self._thread = threading.Thread(target=self._work, name="fake-executor", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch) -> Future[StepResult]:
        step = len(self.batches)
        self.events.append(("submit", step))
        self.batches.append(batch)
        handle = RecordedFuture(step, self.events)
        self._queue.put((batch, handle))
        return handle

    @property
    def num_awaited(self) -> int:
        """Steps that somebody has begun to wait for."""
        return sum(event == "await" for event, _ in self.events)

    def run(self, steps: int = 1) -> None:
        """Let some more steps go."""
        assert self._permits is not None
        self._permits.release(steps)

    def close(self) -> None:
        self.num_closes += 1
        if self._permits is not None:
            self._permits.release(1000)
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        for step, item in enumerate(iter(self._queue.get, None)):
            batch, handle = item
            if self._permits is not None:
                self._permits.acquire()
            if self._fail_at is not None and step >= self._fail_at:
                handle.set_exception(RuntimeError("the kernel met an illegal address"))
            else:
                handle.set_result(self._sample(batch))

    def _sample(self, batch: Batch) -> StepResult:
        sampling = batch.sampling
        columns = (sampling.seeds, sampling.sample_index, sampling.positions)
        tokens = [self._next_token(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
        prompt = batch.prompt_logprobs
        return StepResult(
            np.array(tokens, np.int32),
            _logprobs(np.array(tokens), int(sampling.logprobs.max(initial=-1))),
            _logprobs(prompt.targets, int(prompt.logprobs.max(initial=-1))),
        )


def _logprobs(tokens: Any, most: int) -> TopLogprobs | None:
    """Token t has log-probability −t and rank t + 1; the most likely tokens are 0, 1, 2, …"""
    if most < 0 or not len(tokens):
        return None
    top = np.tile(np.arange(most, dtype=np.int32), (len(tokens), 1))
    return TopLogprobs(-tokens.astype(np.float32), tokens.astype(np.int32) + 1, top, -top.astype(np.float32))


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Token b is the byte b; token 256 is the special token <|end|>."""
    return Tokenizer(byte_tokenizer_spec(), {"eos_token": "<|end|>"}, chat_template)


def byte_tokenizer_spec() -> str:
    """tokenizer.json's text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    chars = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": EOS, "content": "<|end|>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {
        "version": "1.0",
        "added_tokens": [end | flags],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {char: b for b, char in chars.items()}, "merges": []},
    }
    return json.dumps(spec)


def make_loaded(
    executor: Any,
    *,
    tokenizer: Tokenizer | None = None,
    max_num_seqs: int = 4,
    dense_batch_size: int = 16,
    num_pages: int = 64,
    num_host_pages: int = 0,
    seed: int = 0,
) -> Loaded:
    """What ``load`` would return for a model with the executor's tokens."""
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=max_num_seqs,
            dense_batch_size=dense_batch_size,
            max_model_len=MAX_MODEL_LEN,
            page_size=4,
            num_pages=num_pages,
            num_host_pages=num_host_pages,
            swap_cost_per_page=1.0,
            recompute_cost_per_token=1.0,
        )
    )
    model = ModelConfig("LlamaForCausalLM", VOCAB_SIZE, 8, 8, 1, 1, 1, 8, 1e-6, MAX_MODEL_LEN, eos_token_ids=(EOS,))
    inputs = Inputs(
        Limits(VOCAB_SIZE, MAX_MODEL_LEN, max_num_seqs, has_tokenizer=tokenizer is not None),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template if tokenizer else None,
        eos_token_ids=(EOS,),
        seed=seed,
    )
    return Loaded(EngineConfig(max_num_seqs=max_num_seqs), model, scheduler, executor, inputs, tokenizer)


def make_request(request_id: str, prompt_len: int = 3, **params: Any) -> Request:
    """A request whose seed is a hash of its id; EOS ends it."""
    params = {"seed": int.from_bytes(request_id.encode(), "little"), "max_tokens": 8} | params
    sampling = SamplingParams(**params)
    stop = {*(() if sampling.ignore_eos else (EOS,)), *(sampling.stop_token_ids or ())}
    assert sampling.seed is not None
    return Request(request_id, np.arange(prompt_len, dtype=np.int32), sampling, sampling.seed, tuple(sorted(stop)))


def expected_tokens(request: Request, index: int = 0, next_token: NextToken = hashed_token) -> list[int]:
    """What a sequence must come to, from the definition: token by token until a stop token or ``max_tokens``."""
    tokens: list[int] = []
    while len(tokens) < (request.params.max_tokens or 0):
        tokens.append(next_token(request.seed, index, request.prompt_len + len(tokens)))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens
