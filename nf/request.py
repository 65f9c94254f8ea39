"""Request: what a user asked for, tokenized and validated; immutable from here on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt with its sampling parameters.

    Args:
        request_id: unique among the requests in flight.
        prompt_token_ids: int32 [prompt_len], at least one, each below the vocabulary size.
        params: ``max_tokens`` is already resolved to a number.
        seed: Philox key, from ``params.seed`` or drawn from the engine's seed.
        stop_token_ids: EOS ids (unless ``ignore_eos``) and the request's own, sorted; none of them is sampled before
            ``params.min_tokens``.
        bad_words: token ids of each bad word.
        prompt: the text, where there was one.
    """

    request_id: str
    prompt_token_ids: NDArray[np.int32]
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    prompt: str | None = None
    arrival_time: float = 0.0

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def max_len(self) -> int:
        """Prompt and output together, tokens."""
        assert self.params.max_tokens is not None
        return self.prompt_len + self.params.max_tokens
