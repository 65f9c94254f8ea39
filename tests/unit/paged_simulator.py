"""An executor and an engine loop small enough to be read as their specification, for tests of the scheduler.

The executor does literally what a Batch says, one token at a time. Its "KV cache" remembers which token at which
position every page entry holds, so a wrong page, copy or swap is seen by the next step that reads it. A token is a hash
of everything it may depend on: seed, continuation, position and all tokens before.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nf.request import Request
from nf.scheduler.batch import Batch
from nf.scheduler.decision import Decision
from nf.scheduler.scheduler import Scheduler, SchedulerConfig
from nf.scheduler.state import Status

VOCAB = 40
EOS = 0


def next_token(seed: int, index: int, prefix: np.ndarray) -> int:
    """The token a model and sampler would give after ``prefix``."""
    return zlib.crc32(np.array([seed, index, len(prefix), *prefix.tolist()], np.int64).tobytes()) % VOCAB


def run_alone(request: Request, index: int) -> list[int]:
    """All tokens of one continuation of a request that has the engine to itself."""
    tokens = request.prompt_token_ids.tolist()
    while len(tokens) < request.max_len:
        tokens.append(next_token(request.seed, index, np.array(tokens)))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens[request.prompt_len :]


class FakeExecutor:
    """Runs batches on a token buffer [slot, position] and a cache [page, offset] of (token, position)."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.tokens = np.full((config.max_num_seqs, config.max_model_len), -1, np.int64)
        self.cache = np.full((config.num_pages, config.page_size, 2), -1, np.int64)
        self.host = np.full((config.num_host_pages, config.page_size, 2), -1, np.int64)

    def run(self, batch: Batch) -> list[int]:
        """Execute one step; the sampled tokens in the order of ``batch.sampling``."""
        self._check_shape(batch)
        for source, destination in batch.swap_out:
            self.host[destination] = self.cache[source]
        for source, destination in batch.swap_in:
            self.cache[destination] = self.host[source]
        for source, destination in batch.page_copies:
            self.cache[destination] = self.cache[source]
        for row in range(batch.num_tokens):
            if batch.token_ids[row] >= 0:
                self.tokens[batch.token_slots[row], batch.positions[row]] = batch.token_ids[row]
        for source, destination, length in batch.forks:
            self.tokens[destination] = -1
            self.tokens[destination, :length] = self.tokens[source, :length]
        self._append(batch)
        for s in range(batch.num_seqs):
            self._check_reads(batch, s)
        return self._sample(batch)

    def _check_shape(self, batch: Batch) -> None:
        assert batch.num_tokens <= self.config.dense_batch_size
        assert len(set(batch.slots.tolist())) == batch.num_seqs, "a sequence runs twice in a step"
        counts = np.diff(batch.qo_indptr)
        assert (counts > 0).all()
        assert batch.qo_indptr[-1] == batch.num_tokens == len(batch.token_ids) == len(batch.token_slots)
        assert (counts[: batch.num_decode] == 1).all(), "decodes come first, one row each"
        assert (batch.token_ids[: batch.num_decode] == -1).all(), "the host does not know a decode's input token"
        assert batch.kv_indptr[-1] == len(batch.kv_indices)
        assert (batch.token_slots == np.repeat(batch.slots, counts)).all()

    def _pages(self, batch: Batch, s: int) -> np.ndarray:
        pages = batch.kv_indices[batch.kv_indptr[s] : batch.kv_indptr[s + 1]]
        assert (len(pages) - 1) * self.config.page_size + batch.last_page_len[s] == batch.kv_lens[s]
        assert 1 <= batch.last_page_len[s] <= self.config.page_size
        return pages

    def _append(self, batch: Batch) -> None:
        written: dict[int, int] = {}
        for s in range(batch.num_seqs):
            pages = self._pages(batch, s)
            rows = range(batch.qo_indptr[s], batch.qo_indptr[s + 1])
            assert batch.positions[rows[-1]] + 1 == batch.kv_lens[s]
            for row in rows:
                position = int(batch.positions[row])
                token = self.tokens[batch.slots[s], position]
                assert token >= 0, "a row's input token is nowhere"
                page = int(pages[position // self.config.page_size])
                assert written.setdefault(page, s) == s, "two sequences append to one page"
                self.cache[page, position % self.config.page_size] = (token, position)

    def _check_reads(self, batch: Batch, s: int) -> None:
        length = int(batch.kv_lens[s])
        entries = self.cache[self._pages(batch, s)].reshape(-1, 2)[:length]
        assert (entries[:, 1] == np.arange(length)).all(), "the cache holds other positions"
        assert (entries[:, 0] == self.tokens[batch.slots[s], :length]).all(), "the cache holds other tokens"

    def _sample(self, batch: Batch) -> list[int]:
        sampling = batch.sampling
        sampled = []
        for r in range(len(sampling.rows)):
            slot, position, row = int(sampling.slots[r]), int(sampling.positions[r]), int(sampling.rows[r])
            assert batch.positions[row] + 1 == position, "a token is sampled from another position's logits"
            prefix = self.tokens[slot, :position]
            assert (prefix == self.tokens[batch.token_slots[row], :position]).all(), "a sibling has another prompt"
            sampled.append(next_token(int(sampling.seeds[r]), int(sampling.sample_index[r]), prefix))
        for r, token in enumerate(sampled):
            self.tokens[sampling.slots[r], sampling.positions[r]] = token
        return sampled


@dataclass
class Driver:
    """The engine's loop: a step is formed before the tokens of the one before are looked at."""

    config: SchedulerConfig
    scheduler: Scheduler = field(init=False)
    executor: FakeExecutor = field(init=False)
    requests: dict[str, Request] = field(default_factory=dict)
    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    done: set[tuple[str, int]] = field(default_factory=set)
    aborted: set[tuple[str, int]] = field(default_factory=set)
    surplus: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    prompt_targets: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    in_flight: list[tuple[tuple[str, int], int, int]] = field(default_factory=list)  # owner, position, token

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.executor = FakeExecutor(self.config)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        for index in range(request.params.n):
            self.outputs[request.request_id, index] = []

    def step(self) -> Batch:
        """Form and run step i + 1, then look at the tokens of step i."""
        decision = self._decide()
        batch = self.scheduler.apply(decision)
        self.scheduler.check()
        self._check_filled(batch)
        self._note_prompt_logprobs(batch)
        tokens = self.executor.run(batch)
        owners = self.scheduler.owners(batch.sampling.slots.tolist())
        seen, self.in_flight = self.in_flight, list(zip(owners, batch.sampling.positions.tolist(), tokens, strict=True))
        for owner, position, token in seen:
            self._receive(owner, position, token)
        self.scheduler.check()
        return batch

    def abort(self, request_id: str, index: int | None = None) -> None:
        indices = range(self.requests[request_id].params.n) if index is None else [index]
        owners = {(request_id, i) for i in indices} - self.done
        self.aborted |= owners
        self.done |= owners
        self.scheduler.finish(request_id, index)
        self.scheduler.check()

    @property
    def idle(self) -> bool:
        return len(self.done) == len(self.outputs) and not self.in_flight

    def check_outputs(self) -> None:
        """Every continuation has exactly the tokens of a run alone; an aborted one the first of them."""
        for (request_id, index), output in self.outputs.items():
            alone = run_alone(self.requests[request_id], index)
            if (request_id, index) in self.aborted:
                alone = alone[: len(output)]
            assert output == alone
        assert all(count <= 1 for count in self.surplus.values()), "more than one token past the end"

    def check_baseline(self) -> None:
        assert self.idle
        assert not self.scheduler.has_work
        assert self.scheduler.num_free_pages == self.config.num_pages
        assert self.scheduler.num_free_host_pages == self.config.num_host_pages
        assert self.scheduler.num_running == self.scheduler.num_preempted == self.scheduler.num_waiting == 0
        assert not self.scheduler._state.slots_of
        assert not self.scheduler._state.status.any()

    def _decide(self) -> Decision:
        """Decide; every few steps decide twice and hold that deciding changes nothing."""
        before = fingerprint(self.scheduler._state) if self.scheduler.counters.steps % 4 == 0 else None
        decision = self.scheduler.schedule()
        if before is not None:
            assert fingerprint(decision) == fingerprint(self.scheduler.schedule())
            assert fingerprint(self.scheduler._state) == before
        decoding = set(np.flatnonzero(self.scheduler._state.status == Status.DECODE).tolist())
        assert decoding <= set(decision.decodes.tolist()) | set(decision.preempted.tolist()), "a decode was left out"
        return decision

    def _check_filled(self, batch: Batch) -> None:
        if (self.scheduler._state.status == Status.PREFILL).any():
            assert batch.num_tokens == self.config.dense_batch_size, "rows lie idle while a prompt waits"

    def _note_prompt_logprobs(self, batch: Batch) -> None:
        asked = batch.prompt_logprobs
        for row, slot, target in zip(asked.rows.tolist(), asked.slots.tolist(), asked.targets.tolist(), strict=True):
            assert batch.token_slots[row] == slot
            found = self.prompt_targets[self.scheduler.owner(slot)[0]]
            position = int(batch.positions[row]) + 1
            assert position not in found, "a prompt log-probability is reported twice"
            found[position] = target

    def _receive(self, owner: tuple[str, int], position: int, token: int) -> None:
        if owner in self.done:
            self.surplus[owner] += owner not in self.aborted
            return
        request, output = self.requests[owner[0]], self.outputs[owner]
        assert position == request.prompt_len + len(output), "a token was sampled twice or left out"
        output.append(token)
        if token in request.stop_token_ids or position + 1 == request.max_len:
            self.done.add(owner)
            self.scheduler.finish(*owner)


def fingerprint(value: Any) -> Any:
    """A comparable copy of everything an object holds."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(key, fingerprint(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [fingerprint(item) for item in value]
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    names += list(getattr(value, "__dict__", {}))
    return [(name, fingerprint(getattr(value, name))) for name in names] if names else repr(value)
