"""SchedulerConfig: the sizes and costs the scheduler works with."""

from __future__ import annotations

from dataclasses import dataclass

from nf.config import Preemption
from nf.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes are fixed for the life of a scheduler.

    Args:
        max_num_seqs: slots; each of a request's n continuations takes one.
        dense_batch_size: most rows (tokens) of one step, B_dense.
        max_model_len: most tokens of one sequence, prompt and output together.
        page_size: tokens whose keys and values one page holds.
        num_pages: pages on the device.
        num_host_pages: pages on the host, for the KV of preempted sequences.
        swap_cost_per_page: of swapping one page out and back in.
        recompute_cost_per_token: of computing the KV of one token again, in the same unit: bytes moved, or seconds.
        preemption: "auto" takes the cheaper of the two; "swap" and "recompute" force one. Without enough free host
            pages a sequence is always recomputed.

    Raises:
        InputError: a size does not make sense; the field is the one users set.
    """

    max_num_seqs: int
    dense_batch_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    num_host_pages: int = 0
    swap_cost_per_page: float = 0.0
    recompute_cost_per_token: float = 0.0
    preemption: Preemption = "auto"

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "dense_batch_size", "max_model_len", "page_size", "num_pages"):
            if getattr(self, name) < 1:
                raise InputError(_USER_NAMES.get(name, name), f"must be at least 1, not {getattr(self, name)}")
        for name in ("num_host_pages", "swap_cost_per_page", "recompute_cost_per_token"):
            if getattr(self, name) < 0:
                raise InputError(name, f"must be at least 0, not {getattr(self, name)}")
        if self.preemption not in ("auto", "swap", "recompute"):
            raise InputError("preemption", f'must be "auto", "swap" or "recompute", not {self.preemption!r}')
        if self.max_num_seqs > self.dense_batch_size:
            raise InputError(
                "max_num_seqs",
                f"{self.max_num_seqs} decoding sequences need a row each, but max_num_batched_tokens is "
                f"{self.dense_batch_size}; lower the one or raise the other",
            )


_USER_NAMES = {"dense_batch_size": "max_num_batched_tokens"}
