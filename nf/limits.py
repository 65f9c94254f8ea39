"""Limits: what a model and an engine accept, and the sentence that says so when an input does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf.errors import InputError, shown
from nf.request import Request
from nf.sampling_params import MAX_BAD_WORD_TOKENS, MAX_STOP_TOKENS, SamplingParams

NO_TOKENIZER = "needs a tokenizer, but this engine was made with skip_tokenizer_init=True"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the engine accept. ``field`` and ``params_field`` are how errors call what they are about.

    Args:
        vocab_size: token ids are below it.
        max_model_len: most tokens of prompt and output together.
        max_num_seqs: most sequences that run at once, so most continuations of one request.
        has_tokenizer: whether there is text, or token ids only.
    """

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    has_tokenizer: bool

    def token_ids(self, field: str, token_ids: Sequence[int] | NDArray[Any]) -> NDArray[np.int32]:
        """The ids of a prompt as int32 [prompt_len], once each is known to be in the vocabulary."""
        if len(token_ids) == 0:
            raise InputError(field, "is empty; give at least one token")
        vocab_size = self.vocab_size
        for position, token_id in enumerate(token_ids):
            if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
                raise InputError(f"{field}[{position}]", f"must be a token id, not {shown(token_id)}")
            if not 0 <= token_id < vocab_size:
                raise InputError(f"{field}[{position}]", f"token id {shown(int(token_id))} is not in [0, {vocab_size})")
        return np.array(token_ids, np.int32)

    def check_length(self, field: str, prompt_len: int, params: SamplingParams, params_field: str) -> SamplingParams:
        """Parameters with ``max_tokens`` resolved, once prompt and output are known to fit the model."""
        most = self.max_model_len
        if params.max_tokens is None:
            if prompt_len >= most:
                raise InputError(field, f"{prompt_len} tokens leave no room for output in the model length {most}")
            if params.min_tokens > most - prompt_len:
                left = most - prompt_len
                raise InputError(f"{params_field}min_tokens", f"{params.min_tokens} exceeds the {left} tokens left")
            return params.with_(max_tokens=most - prompt_len)
        if prompt_len + params.max_tokens > most:
            raise InputError(
                field,
                f"{prompt_len} prompt tokens + max_tokens {params.max_tokens} = {prompt_len + params.max_tokens}, "
                f"more than the model length {most}",
            )
        return params

    def check_params(self, request: Request, params_field: str) -> None:
        """What SamplingParams cannot know: the vocabulary, the tokenizer, the size of the engine."""
        params, vocab_size = request.params, self.vocab_size
        if params.n > self.max_num_seqs:
            raise InputError(f"{params_field}n", f"must be at most max_num_seqs = {self.max_num_seqs}, not {params.n}")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if token_id >= vocab_size:
                    raise InputError(f"{params_field}{name}", f"token id {shown(token_id)} is not in [0, {vocab_size})")
        for name in ("stop", "bad_words"):
            if getattr(params, name) and not self.has_tokenizer:
                raise InputError(f"{params_field}{name}", NO_TOKENIZER)
        num_tokens = sum(map(len, request.bad_words))
        if num_tokens > MAX_BAD_WORD_TOKENS:
            raise InputError(
                f"{params_field}bad_words", f"are {num_tokens} tokens; at most {MAX_BAD_WORD_TOKENS} are accepted"
            )
        if len(request.stop_token_ids) > MAX_STOP_TOKENS:
            raise InputError(
                f"{params_field}stop_token_ids",
                f"are {len(request.stop_token_ids)} with the model's own; at most {MAX_STOP_TOKENS} are accepted",
            )
        if params.allowed_token_ids is not None:
            early = set(params.allowed_token_ids) - {word[0] for word in request.bad_words if len(word) == 1}
            if params.min_tokens:
                early -= set(request.stop_token_ids)
            if not early:
                raise InputError(
                    f"{params_field}allowed_token_ids",
                    "leaves no token to sample once min_tokens and bad_words are applied",
                )
