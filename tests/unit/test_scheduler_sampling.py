"""Sampling parameters on their way from a request to the arrays of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_scheduler import make_config

from nf.request import Request
from nf.sampling_params import SamplingParams
from nf.scheduler.batch import SamplingBatch
from nf.scheduler.scheduler import Scheduler


def request(request_id: str, *, stop: tuple[int, ...] = (), bad: tuple[Any, ...] = (), **params: Any) -> Request:
    return Request(
        request_id,
        np.array([5, 6, 7], np.int32),
        SamplingParams(**params),
        seed=2**64 - 1,
        stop_token_ids=stop,
        bad_words=bad,
    )


def steps(*requests: Request, count: int) -> list[SamplingBatch]:
    scheduler = Scheduler(make_config())
    for r in requests:
        scheduler.add(r)
    return [scheduler.apply(scheduler.schedule()).sampling for _ in range(count)]


def part(indptr: Any, values: Any, row: int) -> list[Any]:
    return values[indptr[row] : indptr[row + 1]].tolist()


def test_scalars_are_gathered_per_row() -> None:
    special = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "min_p": 0.125,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.25,
        "logprobs": 4,
    }
    prompt, decode = steps(request("plain"), request("special", n=2, **special), count=2)
    for batch in (prompt, decode):
        assert sorted(batch.sample_index.tolist()) == [0, 0, 1]
        assert (batch.prompt_lens == 3).all()
        assert (batch.seeds == np.uint64(2**64 - 1)).all()
        plain = batch.slots == 0
        for name, value in special.items():
            column = getattr(batch, name)
            default = {"temperature": 1, "top_p": 1, "repetition_penalty": 1, "logprobs": -1}.get(name, 0)
            assert column[plain].tolist() == [default]
            assert column[~plain].tolist() == [value, value]
    assert prompt.positions.tolist() == [3, 3, 3]
    assert decode.positions.tolist() == [4, 4, 4]


def test_a_slot_that_changes_hands_takes_the_new_parameters() -> None:
    scheduler = Scheduler(make_config(max_num_seqs=1))
    scheduler.add(request("a", temperature=0.25, logit_bias={7: 1.0}))
    scheduler.add(request("b", temperature=0.5))
    found = []
    for name in ("a", "b"):
        found += [scheduler.apply(scheduler.schedule()).sampling for _ in range(3)]
        scheduler.finish(name)
    assert [batch.slots.tolist() for batch in found] == [[0]] * 6
    assert [batch.temperature.tolist() for batch in found] == [[0.25]] * 3 + [[0.5]] * 3
    assert [batch.positions.tolist() for batch in found] == [[3], [4], [5]] * 2
    assert [batch.bias_ids.tolist() for batch in found] == [[7]] * 3 + [[]] * 3


def test_rows_without_lists_have_empty_ones() -> None:
    (batch,) = steps(request("a"), request("b", stop=(0,)), count=1)
    for indptr in (batch.bias_indptr, batch.allowed_indptr, batch.bad_words_indptr):
        assert indptr.tolist() == [0, 0, 0]
    assert batch.bad_words_token_indptr.tolist() == [0]


def test_lists_stand_in_the_rows_of_their_requests() -> None:
    requests = [
        request("a", logit_bias={7: 1.5, 9: -2.0}),
        request("b"),
        request("c", allowed_token_ids=[3, 4], bad=((1, 2), (8,))),
        request("d", bad=((6, 6, 6),)),
    ]
    for batch in steps(*requests, count=2):
        assert [part(batch.bias_indptr, batch.bias_ids, r) for r in range(4)] == [[7, 9], [], [], []]
        assert part(batch.bias_indptr, batch.bias_values, 0) == [1.5, -2.0]
        assert [part(batch.allowed_indptr, batch.allowed_ids, r) for r in range(4)] == [[], [], [3, 4], []]
        words = [part(batch.bad_words_token_indptr, batch.bad_words_ids, w) for w in range(3)]
        assert words == [[1, 2], [8], [6, 6, 6]]
        assert batch.bad_words_indptr.tolist() == [0, 0, 0, 2, 3]


@pytest.mark.parametrize("bias", [None, {4: 2.0, 8: 1.0}])
def test_stop_tokens_are_forbidden_before_min_tokens(bias: dict[int, float] | None) -> None:
    batches = steps(request("a", stop=(0, 4), min_tokens=2, max_tokens=5, logit_bias=bias), count=4)
    for outputs, batch in enumerate(batches):
        found = dict(zip(batch.bias_ids.tolist(), batch.bias_values.tolist(), strict=True))
        assert len(found) == len(batch.bias_ids), "an id stands twice"
        forbidden = {0: -np.inf, 4: -np.inf} if outputs < 2 else {}
        assert found == (bias or {}) | forbidden
