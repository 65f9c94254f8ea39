"""Random workloads: whatever the scheduler does, every request gets exactly the tokens of a run alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_simulator import EOS, VOCAB, Driver

from nf.errors import InputError
from nf.request import Request
from nf.sampling_params import SamplingParams
from nf.scheduler.pages import pages_for
from nf.scheduler.scheduler import SchedulerConfig


def make_config(**changes: Any) -> SchedulerConfig:
    values: dict[str, Any] = {
        "max_num_seqs": 8,
        "dense_batch_size": 16,
        "max_model_len": 64,
        "page_size": 4,
        "num_pages": 64,
    }
    return SchedulerConfig(**(values | changes))


def make_request(
    request_id: str = "r", prompt_len: int = 5, max_tokens: int = 8, *, eos: bool = False, **params: Any
) -> Request:
    rng = np.random.default_rng(sum(map(ord, request_id)))
    return Request(
        request_id,
        rng.integers(1, VOCAB, prompt_len).astype(np.int32),
        SamplingParams(max_tokens=max_tokens, **params),
        seed=int(rng.integers(2**62)),
        stop_token_ids=(EOS,) if eos else (),
    )


def run(driver: Driver, most_steps: int = 2000) -> None:
    for _ in range(most_steps):
        if driver.idle:
            break
        driver.step()
    driver.check_baseline()
    driver.check_outputs()


configs = st.builds(
    lambda seqs, spare_rows, **rest: SchedulerConfig(
        max_num_seqs=seqs, dense_batch_size=seqs + spare_rows, max_model_len=48, **rest
    ),
    seqs=st.integers(1, 8),
    spare_rows=st.integers(0, 12),
    page_size=st.integers(1, 5),
    num_pages=st.integers(3, 40),
    num_host_pages=st.integers(0, 20),
    swap_cost_per_page=st.sampled_from([0.0, 5.0]),
    recompute_cost_per_token=st.sampled_from([0.0, 1.0, 3.0]),
    preemption=st.sampled_from(["auto", "swap", "recompute"]),
)


@settings(max_examples=150, deadline=None)
@given(config=configs, seed=st.integers(0, 2**32), expected_output=st.sampled_from([1.0, 4.0, 256.0]))
def test_random_workloads(config: SchedulerConfig, seed: int, expected_output: float) -> None:
    """Arrivals, aborts, n > 1, EOS, tiny pools; a too low expectation of the outputs makes preemption frequent."""
    rng = np.random.default_rng(seed)
    driver = Driver(config)
    driver.scheduler._state.output_length.average = expected_output
    to_come = int(rng.integers(1, 14))
    budget = 40 + 40 * 30 * to_come  # steps in which even a run of one token per step would end
    while to_come or not driver.idle:
        budget -= 1
        assert budget > 0, "some request never ends"
        for _ in range(int(rng.integers(0, min(to_come, 3) + 1))):
            to_come -= 1
            add_or_refuse(driver, random_request(rng, f"r{to_come}"))
        if driver.requests and rng.random() < 0.05:
            request_id = str(rng.choice(list(driver.requests)))
            n = driver.requests[request_id].params.n
            driver.abort(request_id, None if rng.random() < 0.4 else int(rng.integers(n)))
        driver.step()
    driver.check_baseline()
    driver.check_outputs()
    check_prompt_logprobs(driver)


def random_request(rng: np.random.Generator, request_id: str) -> Request:
    n = int(rng.choice([1, 1, 1, 2, 3]))
    return make_request(
        request_id,
        prompt_len=int(rng.integers(1, 24)),
        max_tokens=int(rng.integers(1, 24)),
        eos=bool(rng.random() < 0.7),
        n=n,
        prompt_logprobs=2 if rng.random() < 0.3 else None,
    )


def add_or_refuse(driver: Driver, request: Request) -> None:
    """A request is refused exactly if it could not run with the device to itself; nothing else notices."""
    config = driver.config
    pages = pages_for(request.max_len - 1, config.page_size)
    if pages > config.num_pages or request.params.n > config.max_num_seqs:
        with pytest.raises(InputError):
            driver.add(request)
    else:
        driver.add(request)


def check_prompt_logprobs(driver: Driver) -> None:
    for request_id, request in driver.requests.items():
        found = driver.prompt_targets.get(request_id, {})
        prompt = request.prompt_token_ids.tolist()
        if request.params.prompt_logprobs is None:
            assert not found
        elif all((request_id, i) not in driver.aborted for i in range(request.params.n)):
            assert found == dict(enumerate(prompt[1:], start=1))


def test_long_run_ends_at_the_baseline() -> None:
    """A few hundred requests through a small pool, with preemptions of both kinds on the way."""
    rng = np.random.default_rng(7)
    driver = Driver(make_config(num_pages=24, num_host_pages=10, swap_cost_per_page=1, recompute_cost_per_token=1))
    driver.scheduler._state.output_length.average = 1.0
    for i in range(200):
        driver.add(random_request(rng, f"r{i}"))
        driver.step()
        driver.scheduler._state.output_length.average = 1.0
    run(driver)
    counters = driver.scheduler.counters
    assert counters.swapped > 5
    assert counters.recomputed > 5
    assert counters.resumed <= counters.swapped + counters.recomputed


def test_decodes_first_then_chunks_in_order_of_arrival() -> None:
    driver = Driver(make_config(dense_batch_size=8))
    driver.add(make_request("a", prompt_len=5))
    driver.add(make_request("b", prompt_len=11))
    first, second, third = driver.step(), driver.step(), driver.step()
    assert (first.num_decode, np.diff(first.qo_indptr).tolist()) == (0, [5, 3])
    assert (second.num_decode, np.diff(second.qo_indptr).tolist()) == (1, [1, 7])
    assert (third.num_decode, np.diff(third.qo_indptr).tolist()) == (1, [1, 1])
    assert len(first.sampling.rows) == 1
    run(driver)


def test_siblings_share_the_prompt_and_copy_its_last_page() -> None:
    driver = Driver(make_config())
    driver.add(make_request("r", prompt_len=10, max_tokens=6, n=3))
    first = driver.step()
    assert first.sampling.rows.tolist() == [9, 9, 9]
    assert sorted(first.sampling.sample_index.tolist()) == [0, 1, 2]
    assert len(first.forks) == 2
    assert driver.config.num_pages - driver.scheduler.num_free_pages == 3  # 2 full pages and a partly filled one
    second = driver.step()
    assert len(second.page_copies) == 2  # the last of the three keeps the original
    assert driver.config.num_pages - driver.scheduler.num_free_pages == 2 + 3
    run(driver)


def test_siblings_of_a_prompt_that_fills_its_pages_copy_nothing() -> None:
    driver = Driver(make_config())
    driver.add(make_request("r", prompt_len=8, max_tokens=6, n=2))
    driver.step()
    assert not len(driver.step().page_copies)
    assert driver.config.num_pages - driver.scheduler.num_free_pages == 2 + 2
    run(driver)


@pytest.mark.parametrize("aborted", [[0], [1], [0, 1], [2, 0], [0, 1, 2]])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_siblings_may_leave_at_any_moment(aborted: list[int], steps: int) -> None:
    """Also the one that prefills for the others, before they are forked."""
    driver = Driver(make_config(dense_batch_size=8))
    driver.add(make_request("r", prompt_len=14, max_tokens=6, n=3))  # prefill takes two steps
    for _ in range(steps):
        driver.step()
    for index in aborted:
        driver.abort("r", index)
    run(driver)
    assert {index for _, index in driver.aborted} == set(aborted)


def test_finish_of_something_gone_is_ignored() -> None:
    driver = Driver(make_config())
    driver.add(make_request("r", n=2))
    driver.step()
    driver.scheduler.finish("nobody")
    driver.abort("r", 1)
    driver.abort("r", 1)
    driver.abort("r")
    driver.abort("r")
    run(driver)


def test_a_sequence_that_sampled_its_last_token_is_not_scheduled_again() -> None:
    driver = Driver(make_config())
    driver.add(make_request("r", prompt_len=3, max_tokens=1))
    driver.step()
    assert not driver.scheduler.has_work
    assert driver.scheduler.num_free_pages == driver.config.num_pages  # nothing reads its KV again
    decision = driver.scheduler.schedule()
    assert decision.empty
    assert decision.num_tokens == 0
    run(driver)


def test_siblings_that_exceed_the_pool_together_still_finish() -> None:
    """Each fits alone, all of them never: the request starts when it has the device to itself."""
    driver = Driver(make_config(num_pages=7))
    driver.add(make_request("before"))
    driver.add(make_request("r", prompt_len=8, max_tokens=20, n=4))
    driver.add(make_request("after"))
    run(driver)


def test_a_stale_decision_is_refused() -> None:
    driver = Driver(make_config())
    driver.add(make_request("r"))
    decision = driver.scheduler.schedule()
    driver.scheduler.finish("r", 0)
    with pytest.raises(AssertionError, match="earlier state"):
        driver.scheduler.apply(decision)


def test_only_requests_whose_prefill_can_begin_are_admitted() -> None:
    driver = Driver(make_config(dense_batch_size=8))
    for name in "abc":
        driver.add(make_request(name, prompt_len=6))
    driver.step()
    assert driver.scheduler.num_waiting == 1
    run(driver)


def test_never_fitting_requests_fail_alone() -> None:
    driver = Driver(make_config(num_pages=5))
    driver.add(make_request("good"))
    driver.step()
    cases = {
        "max_tokens: prompt (12 tokens) plus max_tokens (10) needs 6 KV pages of 4 tokens, but there are only 5": (
            make_request("pages", prompt_len=12, max_tokens=10)
        ),
        "n: 9 continuations need a slot each, but max_num_seqs is 8": make_request("slots", n=9),
        "max_tokens: prompt (5 tokens) plus max_tokens (60) is 65 tokens, more than max_model_len 64": (
            make_request("length", max_tokens=60)
        ),
        "request_id: 'good' is already in use by a request in flight": make_request("good"),
    }
    for message, request in cases.items():
        with pytest.raises(InputError) as error:
            driver.add(request)
        assert str(error.value) == message
    driver.add(make_request("exact", prompt_len=12, max_tokens=9))  # 20 cached tokens: exactly 5 pages
    run(driver)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_num_seqs": 17}, "max_num_seqs"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"dense_batch_size": 0}, "max_num_batched_tokens"),
        ({"page_size": 0}, "page_size"),
        ({"num_pages": 0}, "num_pages"),
        ({"num_host_pages": -1}, "num_host_pages"),
        ({"preemption": "drop"}, "preemption"),
    ],
)
def test_config_errors_name_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        make_config(**changes)
    assert error.value.field == field
