"""Scheduler: which sequences run in the next step, on which pages.

``schedule()`` decides and changes nothing, ``apply()`` carries the decision out and builds the step's arrays. Neither
needs the tokens of the step before: lengths are known without them, and the tokens themselves stay in the executor.
The host learns of an end one step late and then calls ``finish()``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from nf.errors import InputError
from nf.request import Request
from nf.scheduler import transitions
from nf.scheduler.batch import Batch
from nf.scheduler.building import PageMoves, build_batch
from nf.scheduler.config import SchedulerConfig
from nf.scheduler.decision import Admission, Decision
from nf.scheduler.pages import pages_for
from nf.scheduler.policy import schedule
from nf.scheduler.sampling import TokenLists
from nf.scheduler.state import RUNNING, State, Status, Waiting

__all__ = ["Admission", "Counters", "Decision", "Scheduler", "SchedulerConfig"]


@dataclass(slots=True)
class Counters:
    """Totals since the start, in sequences unless they say otherwise."""

    steps: int = 0
    tokens: int = 0  # rows of all dense batches
    admitted: int = 0
    swapped: int = 0
    recomputed: int = 0
    resumed: int = 0
    finished: int = 0


class Scheduler:
    """Use ``batch = scheduler.apply(scheduler.schedule())`` once per step, and ``finish`` whenever a sequence ends."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.counters = Counters()
        self._state = State(config)

    def add(self, request: Request) -> None:
        """Queue a request, behind all that wait.

        Raises:
            InputError: it can never run here, whatever else runs; or its id is in use. Nothing has changed then.
        """
        config, state = self.config, self._state
        if request.request_id in state.waiting or request.request_id in state.slots_of:
            raise InputError("request_id", f"{request.request_id!r} is already in use by a request in flight")
        if request.params.n > config.max_num_seqs:
            raise InputError(
                "n", f"{request.params.n} continuations need a slot each, but max_num_seqs is {config.max_num_seqs}"
            )
        if request.max_len > config.max_model_len:
            raise InputError(
                "max_tokens",
                f"prompt ({request.prompt_len} tokens) plus max_tokens ({request.params.max_tokens}) is "
                f"{request.max_len} tokens, more than max_model_len {config.max_model_len}",
            )
        needed = pages_for(request.max_len - 1, config.page_size)  # the last token is sampled, never cached
        if needed > config.num_pages:
            raise InputError(
                "max_tokens",
                f"prompt ({request.prompt_len} tokens) plus max_tokens ({request.params.max_tokens}) needs {needed} "
                f"KV pages of {config.page_size} tokens, but there are only {config.num_pages}",
            )
        state.waiting[request.request_id] = Waiting(request, TokenLists.of(request), list(range(request.params.n)))

    def schedule(self) -> Decision:
        """Decide on the next step; the state stays as it is, and asking again gives the same answer."""
        return schedule(self._state)

    def apply(self, decision: Decision) -> Batch:
        """Carry out a decision made for the present state: slots, pages, and the arrays of the step."""
        state = self._state
        assert decision.version == state.version, "the decision was made for an earlier state"
        swap_out = transitions.preempt(state, decision)
        swap_in = transitions.resume(state, decision.resumed)
        for admission in decision.admissions:
            transitions.admit(state, admission)
        copies = transitions.grow(state, decision)
        batch = build_batch(state, decision, PageMoves(swap_out, swap_in, copies))
        transitions.advance(state, decision, batch.forks)
        state.version += 1
        self._count(decision, batch)
        return batch

    def finish(self, request_id: str, index: int | None = None) -> None:
        """Let continuation ``index`` of a request go, or all of them: it ended, or nobody wants it any more.

        Allowed at any moment between ``apply`` and the next ``schedule``. Its pages may be written from the next step
        on. One that is already gone is ignored, so an abort may cross an end.
        """
        state = self._state
        state.version += 1
        waiting = state.waiting.get(request_id)
        if waiting is not None:
            waiting.indices = [i for i in waiting.indices if index is not None and i != index]
            if not waiting.indices:
                del state.waiting[request_id]
            return
        slots = state.slots_of.get(request_id, {})
        # Siblings that still wait for the prompt leave first, so that none of them has to take its slot over.
        for i in sorted(slots, reverse=True) if index is None else [index]:
            if i in slots:
                transitions.leave(state, slots.pop(i))
                self.counters.finished += 1
        if not slots:
            state.slots_of.pop(request_id, None)

    def owner(self, slot: int) -> tuple[str, int]:
        """(request_id, index) of the sequence in a slot. Ask right after ``apply``: a slot changes hands later."""
        return self.owners([slot])[0]

    def owners(self, slots: Collection[int]) -> list[tuple[str, int]]:
        """``owner`` of many slots, e.g. ``batch.sampling.slots.tolist()``."""
        owners = self._state.owners
        found = [owner for slot in slots if (owner := owners[slot]) is not None]
        assert len(found) == len(slots), f"one of the slots {slots} is free"
        return found

    def statuses(self, request_id: str) -> set[Status] | None:
        """What the sequences of a request are doing; empty while it waits for slots, None if it is not here."""
        if request_id in self._state.waiting:
            return set()
        slots = self._state.slots_of.get(request_id)
        return None if slots is None else {Status(self._state.status[slot]) for slot in slots.values()}

    @property
    def has_work(self) -> bool:
        """Whether some sequence still needs a step; one whose last token is on its way to the host does not."""
        return bool(self._state.waiting) or bool(np.count_nonzero(self._state.status > int(Status.ENDED)))

    @property
    def num_running(self) -> int:
        """Sequences in prefill or decode."""
        return int(np.count_nonzero(self._state.status >= RUNNING))

    @property
    def num_preempted(self) -> int:
        return int(np.count_nonzero(self._state.status == Status.PREEMPTED))

    @property
    def num_waiting(self) -> int:
        """Requests that have no slots yet."""
        return len(self._state.waiting)

    @property
    def num_free_pages(self) -> int:
        return self._state.pages.num_free

    @property
    def num_free_host_pages(self) -> int:
        return self._state.host_pages.num_free

    def check(self) -> None:
        """Assert the invariants of the whole state; for tests."""
        self._state.check()

    def _count(self, decision: Decision, batch: Batch) -> None:
        counters, swapped = self.counters, int(np.count_nonzero(decision.swapped))
        counters.steps += 1
        counters.tokens += batch.num_tokens
        counters.admitted += sum(len(admission.slots) for admission in decision.admissions)
        counters.swapped += swapped
        counters.recomputed += len(decision.preempted) - swapped
        counters.resumed += len(decision.resumed)
