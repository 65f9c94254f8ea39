"""What a request in flight makes of a step's log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from engine_doubles import byte_tokenizer, make_request

from nf.executors.base import TopLogprobs
from nf.sequence import RequestState


@pytest.mark.parametrize("with_text", [True, False])
def test_places_without_a_token_are_passed_over(with_text: bool) -> None:
    """A GPU lists fewer tokens than were asked for where a row's logits are NaN."""
    request = make_request("request", 3, logprobs=3, prompt_logprobs=3)
    state = RequestState(request, byte_tokenizer() if with_text else None, stream=False)
    top = TopLogprobs(
        np.array([-np.inf], np.float32),
        np.array([2], np.int32),
        np.array([[70, -1, -1]], np.int32),
        np.full((1, 3), -np.inf, np.float32),
    )
    state.add_prompt_logprobs(1, top, 0)
    reported = [state.output().prompt_logprobs[1], state.logprobs_of(1, top, 0)]
    for found in reported:
        assert list(found) == [1, 70]
        assert (found[1].rank, found[70].rank) == (2, 1)
