"""From a decision to the arrays of a Batch. Reads the state as it is before the step counts as computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nf.scheduler.batch import Batch, PromptLogprobsBatch
from nf.scheduler.decision import Decision
from nf.scheduler.pages import Int32
from nf.scheduler.state import Int64, State, Status

NO_PAIRS: Int32 = np.zeros((0, 2), np.int32)
NO_FORKS: Int32 = np.zeros((0, 3), np.int32)


@dataclass(frozen=True, slots=True)
class PageMoves:
    """Copies of whole pages before the step's first append, each row (source, destination)."""

    swap_out: Int32
    swap_in: Int32
    copies: Int32


def build_batch(state: State, decision: Decision, moves: PageMoves) -> Batch:
    """The arrays of one step, S sequences and T tokens; nothing here loops over decoding sequences."""
    decodes, chunks = decision.decodes, decision.chunk_slots
    num_decode = len(decodes)
    slots = np.concatenate([decodes, chunks])
    starts = np.concatenate([state.computed[decodes], decision.chunk_starts])
    counts = np.concatenate([np.ones(num_decode, np.int64), decision.chunk_counts])
    kv_lens = starts + counts
    qo_indptr = _indptr(counts)

    positions = np.repeat(starts - qo_indptr[:-1], counts)
    positions += np.arange(len(positions))
    page_size = state.config.page_size
    kv_pages = -(-kv_lens // page_size)

    # The last chunk of a prompt samples for its own slot and, from the same row, for every sibling.
    done = np.flatnonzero(kv_lens[num_decode:] == state.length[chunks]) + num_decode
    forks = _forks(state, slots[done])
    row_of = dict(zip(slots[done].tolist(), (qo_indptr[done + 1] - 1).tolist(), strict=True))
    fork_rows = np.array([row_of[leader] for leader in forks[:, 0].tolist()], np.int64)
    sampled = np.concatenate([decodes, slots[done], forks[:, 1]])
    token_ids, prompt_logprobs = _prompt_rows(state, decision, num_decode, qo_indptr)
    return Batch(
        step=state.step,
        num_decode=num_decode,
        token_ids=token_ids,
        token_slots=np.repeat(slots, counts).astype(np.int32),
        positions=positions.astype(np.int32),
        slots=slots.astype(np.int32),
        qo_indptr=qo_indptr.astype(np.int32),
        kv_lens=kv_lens.astype(np.int32),
        kv_indptr=_indptr(kv_pages).astype(np.int32),
        kv_indices=state.table_pages(slots, kv_pages),
        last_page_len=(kv_lens - (kv_pages - 1) * page_size).astype(np.int32),
        sampling=state.sampling.gather(
            rows=np.concatenate([np.arange(num_decode), qo_indptr[done + 1] - 1, fork_rows]),
            slots=sampled,
            positions=state.length[sampled],
            prompt_lens=state.prompt_len[sampled],
        ),
        prompt_logprobs=prompt_logprobs,
        swap_out=moves.swap_out,
        swap_in=moves.swap_in,
        page_copies=moves.copies,
        forks=forks,
    )


def _forks(state: State, leaders: Int64) -> Int32:
    """(leader, sibling, prompt length) for every sibling that waits for one of these leaders' prompts."""
    waiting = state.slots(Status.FORKING)
    if not len(waiting) or not len(leaders):
        return NO_FORKS
    ready = waiting[np.isin(state.leader[waiting], leaders)]
    return np.stack([state.leader[ready], ready, state.prompt_len[ready]], axis=1).astype(np.int32)


def _prompt_rows(
    state: State, decision: Decision, num_decode: int, qo_indptr: Int64
) -> tuple[Int32, PromptLogprobsBatch]:
    """Token ids [T] of the dense batch, and the rows whose prediction of the next prompt token was asked for.

    Prompt tokens the executor was given before are not sent again; they belong to recomputed chunks, whose prompt
    log-probabilities were reported before too.
    """
    token_ids = np.full(int(qo_indptr[-1]), -1, np.int32)
    rows, slots, targets = [], [], []
    plan = zip(
        qo_indptr[num_decode:-1].tolist(),
        decision.chunk_slots.tolist(),
        decision.chunk_starts.tolist(),
        decision.chunk_counts.tolist(),
        strict=True,
    )
    for row, slot, start, count in plan:
        request = state.requests[slot]
        assert request is not None
        prompt = request.prompt_token_ids
        first, stop = max(start, int(state.sent[slot])), min(start + count, len(prompt))
        if first >= stop:
            continue
        token_ids[row + first - start : row + stop - start] = prompt[first:stop]
        if state.sampling.prompt_logprobs[slot] >= 0:
            targets.append(prompt[first + 1 : stop + 1])
            rows.append(np.arange(len(targets[-1]), dtype=np.int32) + (row + first - start))
            slots.append(np.full(len(targets[-1]), slot, np.int32))
    if not rows:
        none = np.zeros(0, np.int32)
        return token_ids, PromptLogprobsBatch(none, none, none, none)
    all_slots = np.concatenate(slots)
    return token_ids, PromptLogprobsBatch(
        rows=np.concatenate(rows),
        slots=all_slots,
        targets=np.concatenate(targets),
        logprobs=state.sampling.prompt_logprobs[all_slots],
    )


def _indptr(counts: Int64) -> Int64:
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr
