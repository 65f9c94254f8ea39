"""What a request gives back: RequestOutput, with one CompletionOutput per continuation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token under the model, before temperature and penalties.

    ``rank`` is 1 for the most likely token.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token id → Logprob at one position: the sampled (or prompt) token and the most likely ones."""


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds of the monotonic clock; None until they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    def tpot(self, num_output_tokens: int) -> float | None:
        """Time per output token after the first, seconds."""
        if self.first_token_time is None or self.finished_time is None or num_output_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (num_output_tokens - 1)


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. ``stop_reason`` is the stop string or stop token id that ended it, None for EOS or length."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """Everything known of a request so far; while streaming, texts and token lists are cumulative.

    ``prompt_logprobs[0]`` is None: nothing predicts the first token. ``error`` says in one sentence why a
    continuation has finish_reason "error". ``num_cached_tokens`` counts prompt tokens whose KV was already there.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
