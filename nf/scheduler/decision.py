"""Decision: what the next step does, as a value. Making one changes nothing; ``Scheduler.apply`` carries it out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Admission:
    """A waiting request that gets slots, one per continuation; the first one prefills for all."""

    request_id: str
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """One step. Every field but ``admissions`` is an array over slots.

    Either sequences are preempted or others come in; never both in one step.
    """

    version: int  # of the state it was made for
    preempted: Slots  # newest first
    swapped: NDArray[np.bool_]  # beside preempted: its KV goes to host pages, else it is computed again
    resumed: Slots  # oldest first
    admissions: tuple[Admission, ...]  # in order of arrival
    decodes: Slots  # one row each
    fresh_pages: Slots  # of the decodes: those whose next token starts a page
    copied_pages: Slots  # of the decodes: those whose next token goes to a page others read too, so they copy it
    chunk_slots: Slots  # prefill chunks, in order of arrival
    chunk_starts: NDArray[np.int64]  # first position of each
    chunk_counts: NDArray[np.int64]  # tokens of each

    @property
    def num_tokens(self) -> int:
        """Rows of the dense batch."""
        return len(self.decodes) + int(self.chunk_counts.sum())

    @property
    def empty(self) -> bool:
        """Nothing can run until a sequence that has sampled its last token is finished, or a request is added."""
        return not len(self.decodes) and not len(self.chunk_slots)
