"""The scheduler's state: arrays over slots, page pools and the queue of waiting requests.

A sequence is one of a request's n continuations. It owns one slot from admission until it finishes, also while it is
preempted: the executor's token buffer keeps its tokens in the row of that slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf.request import Request
from nf.scheduler.config import SchedulerConfig
from nf.scheduler.decision import Slots
from nf.scheduler.memory import OutputLength
from nf.scheduler.pages import PagePool, pages_for
from nf.scheduler.sampling import SamplingTable, TokenLists

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Status(IntEnum):
    """What a slot's sequence is doing. The order matters: from RUNNING on it holds device pages."""

    FREE = 0
    ENDED = 1  # its last token is sampled but not yet seen by the host; it holds no pages
    PREEMPTED = 2  # holds host pages if it was swapped, else none
    FORKING = 3  # waits for the prompt that a sibling prefills
    PREFILL = 4  # holds pages for all tokens it has
    DECODE = 5


RUNNING = int(Status.PREFILL)


@dataclass(slots=True)
class Waiting:
    """A request that has no slots yet, and those of its n continuations that are still wanted."""

    request: Request
    lists: TokenLists
    indices: list[int]


class State:
    """Everything a decision depends on. ``version`` counts the changes that outdate one."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        num_slots = config.max_num_seqs
        self.status: NDArray[np.int8] = np.zeros(num_slots, np.int8)
        self.order: Int64 = np.zeros(num_slots, np.int64)  # of admission; siblings follow one another
        self.prompt_len: Int64 = np.zeros(num_slots, np.int64)
        self.max_len: Int64 = np.zeros(num_slots, np.int64)
        # Tokens of the sequence, with the one that is being sampled; all are in the token buffer when the next step
        # runs. A decoding sequence has length = computed + 1.
        self.length: Int64 = np.zeros(num_slots, np.int64)
        self.computed: Int64 = np.zeros(num_slots, np.int64)  # tokens whose KV launched steps have appended
        self.sent: Int64 = np.zeros(num_slots, np.int64)  # prompt tokens the executor has been given
        self.leader: Int64 = np.full(num_slots, -1, np.int64)  # of a FORKING sequence: the slot that prefills for it
        self.num_pages: Int64 = np.zeros(num_slots, np.int64)
        self.shared_pages: Int64 = np.zeros(num_slots, np.int64)  # first pages, counted as the leader's
        # Of a PREEMPTED sequence the row holds host pages. No sequence can have more pages than there are.
        width = min(pages_for(config.max_model_len, config.page_size), config.num_pages)
        self.page_table: Int32 = np.zeros((num_slots, width), np.int32)
        self._numbers: Int64 = np.zeros(0, np.int64)
        self.sampling = SamplingTable(num_slots)
        self.requests: list[Request | None] = [None] * num_slots
        self.owners: list[tuple[str, int] | None] = [None] * num_slots

        self.pages = PagePool(config.num_pages)
        self.host_pages = PagePool(config.num_host_pages)
        self.output_length = OutputLength()
        self.waiting: dict[str, Waiting] = {}  # in order of arrival
        self.slots_of: dict[str, dict[int, int]] = {}  # request_id → index → slot
        self.num_admitted = 0  # sequences, ever; the next one's order
        self.step = 0
        self.version = 0

    def slots(self, status: Status) -> Slots:
        """Slots with this status, ascending."""
        return np.flatnonzero(self.status == int(status))  # of an enum NumPy would look up what makes an array

    def by_age(self, slots: Slots) -> Slots:
        """The same slots, the oldest sequence first."""
        return slots[np.argsort(self.order[slots])] if len(slots) > 1 else slots

    def decodes_again(self, slots: Slots) -> NDArray[np.bool_]:
        """Which of these preempted sequences go on decoding when they come back; the others have to prefill first.

        One whose last prompt token is still to come is not decoding yet, although only one token is missing.
        """
        swapped, generated = self.num_pages[slots] > 0, self.length[slots] > self.prompt_len[slots]
        again: NDArray[np.bool_] = swapped & generated & (self.computed[slots] + 1 == self.length[slots])
        return again

    def pages_of(self, slot: int) -> Int32:
        """The pages of one sequence; of a preempted one these are host pages. A view."""
        return self.page_table[slot, : self.num_pages[slot]]

    def table_pages(self, slots: Slots, counts: NDArray[np.signedinteger[Any]]) -> Int32:
        """The first ``counts`` pages of each of ``slots``, one after the other: int32 [sum of counts].

        Work is proportional to the pages, not to the width of the table.
        """
        ends = np.cumsum(counts)
        starts = slots * self.page_table.shape[1] - (ends - counts)
        flat = np.repeat(starts, counts)
        flat += self._iota(len(flat))
        return self.page_table.ravel().take(flat)

    def _iota(self, count: int) -> Int64:
        """0 … count-1, kept from step to step: so long an array takes longer to make than to read."""
        if count > len(self._numbers):
            self._numbers = np.arange(2 * count)
        return self._numbers[:count]

    def check(self) -> None:
        """Assert what holds between any two calls: page accounting, ages and the relation of the counters."""
        self.pages.check()
        self.host_pages.check()
        status, page_size = self.status, self.config.page_size
        held = np.bincount(
            self.table_pages(*self._holders(status >= RUNNING)), minlength=self.config.num_pages
        )  # references per page, counted from the table
        assert np.array_equal(held, self.pages.refcount), "page table and reference counts disagree"
        on_host = self.table_pages(*self._holders(status == Status.PREEMPTED))
        assert len(np.unique(on_host)) == len(on_host) == self.host_pages.num_used, "host pages leak"
        assert not self.num_pages[status < Status.PREEMPTED].any(), "an ended sequence holds pages"
        assert not self.shared_pages[status == Status.PREEMPTED].any(), "a preempted sequence shares pages"
        decoding = status == Status.DECODE
        assert (self.length[decoding] == self.computed[decoding] + 1).all()
        assert (self.length[decoding] < self.max_len[decoding]).all()
        prefilling = status == Status.PREFILL
        assert (self.computed[prefilling] < self.length[prefilling]).all()
        reserved = -(-self.length[prefilling] // page_size)
        assert (self.num_pages[prefilling] == reserved).all(), "a prefill has not reserved its pages"
        running, preempted = self.order[status >= RUNNING], self.order[status == Status.PREEMPTED]
        if len(running) and len(preempted):
            assert running.max() < preempted.min(), "a preempted sequence is older than a running one"
        for slot in self.slots(Status.FORKING):
            assert self.owners[slot] is not None
            assert self.status[self.leader[slot]] in (Status.PREFILL, Status.PREEMPTED), "nobody prefills for a sibling"

    def _holders(self, mask: NDArray[np.bool_]) -> tuple[Slots, Int64]:
        slots = np.flatnonzero(mask)
        return slots, self.num_pages[slots]
