"""What applying a decision does to the state, one function per kind of change, and how a sequence leaves."""

from __future__ import annotations

import numpy as np

from nf.scheduler.building import NO_PAIRS
from nf.scheduler.decision import Admission, Decision, Slots
from nf.scheduler.pages import Int32, pages_for
from nf.scheduler.state import RUNNING, State, Status, Waiting


def preempt(state: State, decision: Decision) -> Int32:
    """Take the preempted sequences' device pages: swap_out pairs (device page, host page)."""
    pairs = []
    for slot, swapped in zip(decision.preempted.tolist(), decision.swapped.tolist(), strict=True):
        pages = state.pages_of(slot).copy()
        state.pages.release(pages)
        state.status[slot] = Status.PREEMPTED
        state.shared_pages[slot] = 0  # whatever it read with others, it comes back with pages of its own
        if swapped:
            filled = pages_for(int(state.computed[slot]), state.config.page_size)
            host = state.host_pages.allocate(filled)
            pairs.append(np.stack([pages[:filled], host], axis=1))
            _put_pages(state, slot, host)
        else:
            state.num_pages[slot] = 0
            state.computed[slot] = 0
    return np.concatenate(pairs) if pairs else NO_PAIRS


def resume(state: State, slots: Slots) -> Int32:
    """Give preempted sequences device pages for all their tokens: swap_in pairs (host page, device page)."""
    if not len(slots):
        return NO_PAIRS
    pairs = []
    state.status[slots] = np.where(state.decodes_again(slots), Status.DECODE, Status.PREFILL)
    for slot in slots.tolist():
        host = state.pages_of(slot).copy()
        pages = state.pages.allocate(pages_for(int(state.length[slot]), state.config.page_size))
        state.host_pages.release(host)
        pairs.append(np.stack([host, pages[: len(host)]], axis=1))
        _put_pages(state, slot, pages)
    return np.concatenate(pairs)


def admit(state: State, admission: Admission) -> None:
    """Give a waiting request its slots, and pages for the whole prompt to the first of them."""
    waiting = state.waiting.pop(admission.request_id)
    request, page_size = waiting.request, state.config.page_size
    leader = admission.slots[0]
    for index, slot in zip(waiting.indices, admission.slots, strict=True):
        _put_sequence(state, slot, waiting, index)
        if slot != leader:
            state.status[slot] = Status.FORKING
            state.leader[slot] = leader
            state.shared_pages[slot] = request.prompt_len // page_size
    state.slots_of[request.request_id] = dict(zip(waiting.indices, admission.slots, strict=True))
    state.status[leader] = Status.PREFILL
    _put_pages(state, leader, state.pages.allocate(pages_for(request.prompt_len, page_size)))


def grow(state: State, decision: Decision) -> Int32:
    """Give decodes the pages their next tokens need: page_copies pairs (shared page, own page)."""
    fresh, copied = decision.fresh_pages, decision.copied_pages
    if len(fresh):
        state.page_table[fresh, state.num_pages[fresh]] = state.pages.allocate(len(fresh))
        state.num_pages[fresh] += 1
    if not len(copied):
        return NO_PAIRS
    last = state.num_pages[copied] - 1
    shared = state.page_table[copied, last]
    own = state.pages.allocate(len(copied))
    state.page_table[copied, last] = own
    state.pages.release(shared)
    return np.stack([shared, own], axis=1)


def advance(state: State, decision: Decision, forks: Int32) -> None:
    """Count the step as computed: its tokens are in the cache and one more is on its way to whoever sampled."""
    sampled = decision.decodes
    state.computed[sampled] += 1
    if len(decision.chunk_slots):
        sampled = np.concatenate([sampled, _advance_chunks(state, decision, forks)])
    lengths = state.length[sampled] + 1
    state.length[sampled] = lengths

    # Nothing reads the KV of a sequence again that has sampled its last token.
    ended = sampled[lengths == state.max_len[sampled]]
    if len(ended):
        state.status[ended] = Status.ENDED
        state.pages.release(state.table_pages(ended, state.num_pages[ended]))
        state.num_pages[ended] = 0
    state.step += 1


def _advance_chunks(state: State, decision: Decision, forks: Int32) -> Slots:
    """Count prefill chunks as computed; the sequences that begin to decode, siblings last."""
    chunks = decision.chunk_slots
    state.computed[chunks] += decision.chunk_counts
    state.sent[chunks] = np.maximum(state.sent[chunks], np.minimum(state.computed[chunks], state.prompt_len[chunks]))
    done = chunks[state.computed[chunks] == state.length[chunks]]
    for leader, sibling in forks[:, :2].tolist():
        pages = state.pages_of(leader)
        state.pages.retain(pages)
        _put_pages(state, sibling, pages)
        state.computed[sibling] = state.computed[leader]
        state.sent[sibling] = state.sent[leader]
        state.leader[sibling] = -1
    started = np.concatenate([done, forks[:, 1]])
    state.status[started] = Status.DECODE
    return started


def leave(state: State, slot: int) -> None:
    """Free a sequence's slot and everything it holds, whatever it is doing."""
    status = int(state.status[slot])
    heirs = state.slots(Status.FORKING)
    heirs = heirs[state.leader[heirs] == slot]
    if len(heirs):  # the prompt in this slot is still wanted: the next sibling takes the slot over and gives up its own
        heir = int(heirs[np.argmin(state.order[heirs])])
        owner = state.owners[heir]
        assert owner is not None
        state.owners[slot] = owner
        state.slots_of[owner[0]][owner[1]] = slot
        state.sampling.pass_on(slot, owner[1])
        slot = heir
    elif status >= RUNNING:
        state.pages.release(state.pages_of(slot))
    elif status == Status.PREEMPTED:
        state.host_pages.release(state.pages_of(slot))
    num_outputs = int(state.length[slot] - state.prompt_len[slot])
    if num_outputs:
        state.output_length.add(num_outputs)
    state.status[slot] = Status.FREE
    state.num_pages[slot] = state.shared_pages[slot] = 0
    state.leader[slot] = -1
    state.requests[slot] = state.owners[slot] = None


def _put_sequence(state: State, slot: int, waiting: Waiting, index: int) -> None:
    request = waiting.request
    state.order[slot] = state.num_admitted
    state.num_admitted += 1
    state.prompt_len[slot] = state.length[slot] = request.prompt_len
    state.max_len[slot] = request.max_len
    state.computed[slot] = state.sent[slot] = 0
    state.num_pages[slot] = state.shared_pages[slot] = 0
    state.leader[slot] = -1
    state.requests[slot] = request
    state.owners[slot] = (request.request_id, index)
    state.sampling.put(slot, request, index, waiting.lists)


def _put_pages(state: State, slot: int, pages: Int32) -> None:
    state.page_table[slot, : len(pages)] = pages
    state.num_pages[slot] = len(pages)
