"""The boundary between the engine and whatever runs a step: one method, arrays in, arrays out."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nf.scheduler.batch import Batch


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Log-probabilities of N chosen tokens and of the K most likely ones at their positions."""

    logprobs: NDArray[np.float32]  # [N] of the chosen token, before temperature and penalties
    ranks: NDArray[np.int32]  # [N] 1 is the most likely
    top_ids: NDArray[np.int32]  # [N, K] most likely first; -1 where there is none, as beyond what a row asked for
    top_logprobs: NDArray[np.float32]  # [N, K]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, in the order of ``Batch.sampling`` and ``Batch.prompt_logprobs``."""

    token_ids: NDArray[np.int32]  # [R] -1: the row's logits held NaN or +inf, or every token was forbidden
    logprobs: TopLogprobs | None  # None if no row asked
    prompt_logprobs: TopLogprobs | None


StepHandle: TypeAlias = "Future[StepResult]"
"""Completes when the step's tokens are on the host; ``asyncio.wrap_future`` awaits it."""


class Executor(Protocol):
    """Runs steps strictly in the order they are submitted.

    A page freed by step i may be given away at once: the first step that can write it is i + 1, which runs after.
    """

    page_size: int
    num_pages: int
    num_host_pages: int

    def submit(self, batch: Batch) -> StepHandle:
        """Enqueue one step and return at once. A failure is delivered by the handle, and by every later one."""
        ...

    def close(self) -> None:
        """Finish what was submitted, free everything; idempotent."""
        ...
