"""The policy: ``schedule(state) -> Decision``. Reads the state, changes nothing, has no clock.

One step, in order of precedence:

1. every decoding sequence gets a row, and a page where its next token needs one;
2. if there are too few free pages for that, the newest sequences are preempted until there are enough;
3. otherwise preempted sequences come back and, once all are back, waiting requests are admitted, strictly first come
   first served and as many as the predicted peak of memory allows;
4. the rows left are filled with prefill chunks, the oldest sequence first.

Because the newest leave first and the oldest come back first, every running sequence is older than every preempted one;
so the oldest is never held up, and everyone becomes the oldest in the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.scheduler.decision import Admission, Decision, Slots
from nf.scheduler.memory import longest_prefix
from nf.scheduler.pages import Int32, pages_for
from nf.scheduler.state import RUNNING, Int64, State, Status, Waiting

NO_SLOTS: Slots = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class _PageDemand:
    """Decodes whose next token needs a page: because it starts one, or because others read the one it goes to."""

    fresh: Slots
    copied: Slots

    @property
    def num_pages(self) -> int:
        return len(self.fresh) + len(self.copied)


@dataclass(frozen=True, slots=True)
class _Intake:
    """Who comes in."""

    resumed: Slots
    admissions: tuple[Admission, ...]


NOBODY = _Intake(NO_SLOTS, ())


def schedule(state: State) -> Decision:
    """Decide on the next step. Time is linear in the slots, plus a sort of them when somebody may come in."""
    decodes = state.slots(Status.DECODE)
    prefills = state.by_age(state.slots(Status.PREFILL))
    demand = _page_demand(state, decodes, state.pages.refcount)
    preempted, intake = NO_SLOTS, NOBODY
    if demand.num_pages > state.pages.num_free:
        preempted, demand = _choose_preempted(state, decodes)
        decodes = decodes[~np.isin(decodes, preempted)]
        prefills = prefills[~np.isin(prefills, preempted)]
    else:
        intake = _take_in(state, decodes, prefills, state.pages.num_free - demand.num_pages)

    back = intake.resumed
    if len(back):  # they take part in this very step
        decodes_again = state.decodes_again(back)
        decodes = np.concatenate([decodes, back[decodes_again]])
        prefills = np.concatenate([prefills, back[~decodes_again]])
    chunks = _fill(state.config.dense_batch_size - len(decodes), state, prefills, intake.admissions)
    return Decision(
        version=state.version,
        preempted=preempted,
        swapped=_choose_swapped(state, preempted),
        resumed=back,
        admissions=intake.admissions,
        decodes=decodes,
        fresh_pages=demand.fresh,
        copied_pages=demand.copied,
        chunk_slots=chunks[0],
        chunk_starts=chunks[1],
        chunk_counts=chunks[2],
    )


def _page_demand(state: State, decodes: Slots, refcount: Int32) -> _PageDemand:
    index = state.computed[decodes] // state.config.page_size  # of the page the next token goes to
    starts_page = index == state.num_pages[decodes]
    inside = decodes[~starts_page]
    pages = state.page_table[inside, index[~starts_page]]
    shared = refcount[pages] > 1
    copied = inside[shared]
    if len(copied):  # whoever is last of those that read a page need not copy it
        copied = copied[_all_but_last_owner(pages[shared], refcount)]
    return _PageDemand(decodes[starts_page], copied)


def _all_but_last_owner(pages: Int32, refcount: Int32) -> NDArray[np.bool_]:
    """Which entries of ``pages`` still find another owner if the entries give up their reference one after another."""
    by_page = np.argsort(pages, kind="stable")
    _, first, counts = np.unique(pages[by_page], return_index=True, return_counts=True)
    rank = np.empty(len(pages), np.int64)
    rank[by_page] = np.arange(len(pages)) - np.repeat(first, counts)
    return rank + 1 < refcount[pages]


def _choose_preempted(state: State, decodes: Slots) -> tuple[Slots, _PageDemand]:
    """The newest running sequences, as few as make room for the decodes that are left, and what those then need."""
    refcount, free = state.pages.refcount.copy(), state.pages.num_free
    newest_first = state.by_age(np.flatnonzero(state.status >= RUNNING))[::-1]
    for count, slot in enumerate(newest_first[:-1].tolist(), start=1):  # never the oldest
        pages = state.pages_of(slot)
        refcount[pages] -= 1
        free += int(np.count_nonzero(refcount[pages] == 0))
        decodes = decodes[decodes != slot]
        demand = _page_demand(state, decodes, refcount)
        if demand.num_pages <= free:
            return newest_first[:count], demand
    raise AssertionError("a sequence alone fits: add() has checked it")


def _choose_swapped(state: State, preempted: Slots) -> NDArray[np.bool_]:
    """Whether each preempted sequence's KV goes to the host, as far as there is room, or is computed again."""
    config = state.config
    swapped = np.zeros(len(preempted), np.bool_)
    host_free = state.host_pages.num_free
    for i, computed in enumerate(state.computed[preempted].tolist()):
        pages = pages_for(computed, config.page_size)
        cheaper = pages * config.swap_cost_per_page < computed * config.recompute_cost_per_token
        wanted = config.preemption == "swap" or (config.preemption == "auto" and cheaper)
        if wanted and 0 < pages <= host_free:
            swapped[i] = True
            host_free -= pages
    return swapped


def _take_in(state: State, decodes: Slots, prefills: Slots, free_pages: int) -> _Intake:
    """Preempted sequences and then waiting requests: the longest prefix that has slots, pages and a future.

    Only requests whose prefill could begin in this step are looked at: pages reserved any sooner would lie idle.
    """
    resumable = state.by_age(state.slots(Status.PREEMPTED))
    if not len(resumable) and not state.waiting:
        return NOBODY
    unfinished = np.concatenate([prefills, resumable])
    backlog = len(decodes) + int((state.length[unfinished] - state.computed[unfinished]).sum())
    free_slots = state.slots(Status.FREE)
    waiting = _within_reach(state, state.config.dense_batch_size - backlog, len(free_slots))
    num_candidates = len(resumable) + len(waiting)
    if not num_candidates:
        return NOBODY

    page_size = state.config.page_size
    pages_now = np.concatenate(
        [
            -(-state.length[resumable] // page_size),
            np.array([pages_for(w.request.prompt_len, page_size) for w in waiting], np.int64),
        ]
    )
    have_pages = int(np.searchsorted(np.cumsum(pages_now), free_pages, side="right"))
    taken = _future_fits(state, resumable, waiting, have_pages)
    if not len(decodes) and not len(prefills):  # with the device to itself, anyone may start
        taken = max(taken, min(1, have_pages))
    admissions, next_slot = [], 0
    for w in waiting[: max(taken - len(resumable), 0)]:
        slots = free_slots[next_slot : next_slot + len(w.indices)]
        admissions.append(Admission(w.request.request_id, tuple(slots.tolist())))
        next_slot += len(slots)
    return _Intake(resumable[:taken], tuple(admissions))


def _within_reach(state: State, rows: int, num_free_slots: int) -> list[Waiting]:
    """The first waiting requests for which there are slots, up to the one that fills the last of ``rows``."""
    found: list[Waiting] = []
    for w in state.waiting.values():
        num_free_slots -= len(w.indices)
        if rows <= 0 or num_free_slots < 0:
            break
        found.append(w)
        rows -= w.request.prompt_len
    return found


def _future_fits(state: State, resumable: Slots, waiting: list[Waiting], limit: int) -> int:
    """How many of the first ``limit`` candidates fit beside the running sequences at the predicted peak."""
    if not limit:
        return 0
    page_size = state.config.page_size
    resumable, waiting = resumable[:limit], waiting[: max(limit - len(resumable), 0)]
    running = np.flatnonzero(state.status >= Status.FORKING)
    known = np.concatenate([running, resumable])
    decoded = state.length[known] - state.prompt_len[known]
    outputs = state.output_length.expected(decoded, state.max_len[known] - state.prompt_len[known])
    # A token's KV is appended by the step after the one that sampled it, and the last one's never is.
    tokens = [state.length[known] - 1 - state.shared_pages[known] * page_size]
    remaining = [outputs - decoded]
    for w in waiting:
        own = np.full(len(w.indices), w.request.prompt_len - 1, np.int64)
        own[1:] -= w.request.prompt_len // page_size * page_size
        most = np.full(len(w.indices), w.request.max_len - w.request.prompt_len, np.int64)
        tokens.append(own)
        remaining.append(state.output_length.expected(np.zeros_like(most), most))
    seqs = np.concatenate([np.ones(len(resumable), np.int64), np.array([len(w.indices) for w in waiting], np.int64)])
    # Shared pages that are nobody's own, because the leader has gone, stay until the last sibling ends.
    own_pages = np.maximum(state.num_pages[running] - state.shared_pages[running], 0).sum()
    ownerless = state.pages.num_used - int(own_pages)
    return longest_prefix(
        np.concatenate(tokens),
        np.concatenate(remaining),
        len(running) + np.cumsum(seqs),
        len(running),
        page_size,
        state.config.num_pages - ownerless,
    )


def _fill(rows: int, state: State, slots: Slots, admissions: tuple[Admission, ...]) -> tuple[Slots, Int64, Int64]:
    """Fill ``rows`` with chunks, in this order: (slots, starts, counts). Recomputed sequences start at 0 again."""
    if not len(slots) and not admissions:
        return NO_SLOTS, NO_SLOTS, NO_SLOTS
    starts = state.computed[slots]
    ends = state.length[slots]
    if admissions:
        new = np.array([admission.slots[0] for admission in admissions], np.int64)
        prompts = [state.waiting[admission.request_id].request.prompt_len for admission in admissions]
        slots = np.concatenate([slots, new])
        starts = np.concatenate([starts, np.zeros(len(new), np.int64)])
        ends = np.concatenate([ends, np.array(prompts, np.int64)])
    wanted = ends - starts
    before = np.cumsum(wanted) - wanted
    counts = np.clip(rows - before, 0, wanted)
    some = counts > 0
    return slots[some], starts[some], counts[some]
