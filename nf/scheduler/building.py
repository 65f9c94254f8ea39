"""From a decision to the arrays of a Batch. Reads the state as it is before the step counts as computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nf.scheduler.batch import Batch, PromptLogprobsBatch
from nf.scheduler.decision import Decision, Slots
from nf.scheduler.pages import Int32
from nf.scheduler.state import Int64, State, Status

_Int = TypeVar("_Int", np.int32, np.int64)

NO_PAIRS: Int32 = np.zeros((0, 2), np.int32)
NO_FORKS: Int32 = np.zeros((0, 3), np.int32)


@dataclass(frozen=True, slots=True)
class PageMoves:
    """Copies of whole pages before the step's first append, each row (source, destination)."""

    swap_out: Int32
    swap_in: Int32
    copies: Int32


@dataclass(frozen=True, slots=True)
class _ChunkRows:
    """What the prefill chunks add to each of a batch's arrays, behind the rows of the decodes."""

    token_ids: Int32
    token_slots: Int32
    positions: Int32
    ends: Int32  # row after each chunk's last
    kv_lens: Int32
    sampled: Slots  # sequences that sample: those whose prompt ends here, then their siblings
    sample_rows: Int32
    prompt_logprobs: PromptLogprobsBatch
    forks: Int32


NO_INTS: Int32 = np.zeros(0, np.int32)
NO_PROMPT_LOGPROBS = PromptLogprobsBatch(NO_INTS, NO_INTS, NO_INTS, NO_INTS)
NO_CHUNKS = _ChunkRows(
    NO_INTS, NO_INTS, NO_INTS, NO_INTS, NO_INTS, np.zeros(0, np.int64), NO_INTS, NO_PROMPT_LOGPROBS, NO_FORKS
)


def build_batch(state: State, decision: Decision, moves: PageMoves) -> Batch:
    """The arrays of one step, S sequences and T tokens; nothing here loops over decoding sequences."""
    decodes, page_size = decision.decodes, state.config.page_size
    num_decode = len(decodes)
    chunks = _chunk_rows(state, decision) if len(decision.chunk_slots) else NO_CHUNKS
    slots = _join(decodes, decision.chunk_slots)
    slots32 = slots.astype(np.int32)
    lengths = state.length[decodes].astype(np.int32)  # the token that is read now is the last
    kv_lens = _join(lengths, chunks.kv_lens)
    kv_pages = -(-kv_lens // page_size)
    ends = np.arange(num_decode + 1, dtype=np.int32)
    sampled = _join(decodes, chunks.sampled)
    return Batch(
        step=state.step,
        num_decode=num_decode,
        token_ids=_join(np.full(num_decode, -1, np.int32), chunks.token_ids),
        token_slots=_join(slots32[:num_decode], chunks.token_slots),
        positions=_join(lengths - 1, chunks.positions),
        slots=slots32,
        qo_indptr=_join(ends, chunks.ends),
        kv_lens=kv_lens,
        kv_indptr=_indptr(kv_pages),
        kv_indices=state.table_pages(slots, kv_pages),
        last_page_len=kv_lens - (kv_pages - 1) * page_size,
        sampling=state.sampling.gather(
            rows=_join(ends[:-1], chunks.sample_rows),
            slots=sampled,
            positions=state.length[sampled].astype(np.int32),
        ),
        prompt_logprobs=chunks.prompt_logprobs,
        swap_out=moves.swap_out,
        swap_in=moves.swap_in,
        page_copies=moves.copies,
        forks=chunks.forks,
    )


def _chunk_rows(state: State, decision: Decision) -> _ChunkRows:
    slots, starts, counts = decision.chunk_slots, decision.chunk_starts, decision.chunk_counts
    first = len(decision.decodes)
    ends = first + np.cumsum(counts)
    kv_lens = starts + counts
    positions = np.repeat(kv_lens - ends, counts)
    positions += np.arange(first, ends[-1])

    # The last chunk of a prompt samples for its own slot and, from the same row, for every sibling.
    done = np.flatnonzero(kv_lens == state.length[slots])
    forks = _forks(state, slots[done])
    row_of = dict(zip(slots[done].tolist(), (ends[done] - 1).tolist(), strict=True))
    fork_rows = [row_of[leader] for leader in forks[:, 0].tolist()]
    token_ids, prompt_logprobs = _prompt_rows(state, decision, ends - counts)
    return _ChunkRows(
        token_ids=token_ids,
        token_slots=np.repeat(slots, counts).astype(np.int32),
        positions=positions.astype(np.int32),
        ends=ends.astype(np.int32),
        kv_lens=kv_lens.astype(np.int32),
        sampled=np.concatenate([slots[done], forks[:, 1]]),
        sample_rows=np.array([*row_of.values(), *fork_rows], np.int32),
        prompt_logprobs=prompt_logprobs,
        forks=forks,
    )


def _forks(state: State, leaders: Int64) -> Int32:
    """(leader, sibling, prompt length) for every sibling that waits for one of these leaders' prompts."""
    waiting = state.slots(Status.FORKING)
    if not len(waiting) or not len(leaders):
        return NO_FORKS
    ready = waiting[np.isin(state.leader[waiting], leaders)]
    return np.stack([state.leader[ready], ready, state.prompt_len[ready]], axis=1).astype(np.int32)


def _prompt_rows(state: State, decision: Decision, first_rows: Int64) -> tuple[Int32, PromptLogprobsBatch]:
    """Token ids of the chunks' rows, and the rows whose prediction of the next prompt token was asked for.

    Prompt tokens the executor was given before are not sent again; they belong to recomputed chunks, whose prompt
    log-probabilities were reported before too.
    """
    num_decode = len(decision.decodes)
    token_ids = np.full(int(decision.chunk_counts.sum()), -1, np.int32)
    rows, slots, targets = [], [], []
    plan = zip(
        first_rows.tolist(),
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
        at = row - num_decode - start  # of the prompt's beginning in token_ids
        token_ids[at + first : at + stop] = prompt[first:stop]
        if state.sampling.prompt_logprobs[slot] >= 0:
            targets.append(prompt[first + 1 : stop + 1])
            rows.append(np.arange(len(targets[-1]), dtype=np.int32) + (row + first - start))
            slots.append(np.full(len(targets[-1]), slot, np.int32))
    if not rows:
        return token_ids, NO_PROMPT_LOGPROBS
    all_slots = np.concatenate(slots)
    return token_ids, PromptLogprobsBatch(
        rows=np.concatenate(rows),
        slots=all_slots,
        targets=np.concatenate(targets),
        logprobs=state.sampling.prompt_logprobs[all_slots],
    )


def _indptr(counts: Int32) -> Int32:
    indptr = np.zeros(len(counts) + 1, np.int32)
    counts.cumsum(out=indptr[1:])
    return indptr


def _join(decodes: NDArray[_Int], chunks: NDArray[_Int]) -> NDArray[_Int]:
    """Both, one after the other; most steps have no chunks."""
    return np.concatenate([decodes, chunks]) if len(chunks) else decodes
