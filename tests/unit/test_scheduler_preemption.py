"""Pressure on memory: who is preempted, how, and how everyone comes back."""

from __future__ import annotations

import numpy as np
import pytest
from paged_simulator import Driver
from test_scheduler import make_config, make_request, run

from nf.scheduler.batch import Batch
from nf.scheduler.scheduler import SchedulerConfig


def driver_of(config: SchedulerConfig, expected_output: float = 1.0) -> Driver:
    """An engine that believes outputs are short, so that it admits more than fits."""
    driver = Driver(config)
    driver.scheduler._state.output_length.average = expected_output
    return driver


def step_until_preempted(driver: Driver) -> tuple[Batch, list[tuple[str, int]]]:
    """The first step that preempts, and whom."""
    for _ in range(100):
        decision = driver.scheduler.schedule()
        owners = driver.scheduler.owners(decision.preempted.tolist())
        batch = driver.step()
        if owners:
            return batch, owners
    raise AssertionError("nothing was preempted")


def test_the_newest_leaves_and_everyone_finishes() -> None:
    driver = driver_of(make_config(num_pages=9))
    for name in "abc":
        driver.add(make_request(name, prompt_len=8, max_tokens=20))
    _, preempted = step_until_preempted(driver)
    assert preempted == [("c", 0)]
    driver.add(make_request("d"))
    run(driver)
    assert driver.scheduler.counters.resumed == driver.scheduler.counters.recomputed > 0


def test_no_more_are_preempted_than_needed() -> None:
    driver = driver_of(make_config(num_pages=12, dense_batch_size=32))
    for name in "abcd":
        driver.add(make_request(name, prompt_len=8, max_tokens=24))
    _, preempted = step_until_preempted(driver)
    assert preempted == [("d", 0)]
    run(driver)


@pytest.mark.parametrize(
    ("page_bytes", "token_bytes", "swapped"),
    [(3, 1, True), (5, 1, False), (4, 1, False)],  # 4 tokens a page; at equal cost no host pages are taken
)
def test_auto_moves_fewer_bytes(page_bytes: float, token_bytes: float, swapped: bool) -> None:
    config = make_config(
        num_pages=9, num_host_pages=9, swap_cost_per_page=page_bytes, recompute_cost_per_token=token_bytes
    )
    driver = driver_of(config)
    for name in "abc":
        driver.add(make_request(name, prompt_len=8, max_tokens=20))
    batch, _ = step_until_preempted(driver)
    assert bool(len(batch.swap_out)) is swapped
    run(driver)
    counters = driver.scheduler.counters
    assert (counters.swapped > 0) is swapped
    assert (counters.recomputed > 0) is not swapped


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_config_forces_the_kind(preemption: str) -> None:
    costs = (1, 0) if preemption == "swap" else (0, 1)  # against the cheaper kind
    config = make_config(
        num_pages=9,
        num_host_pages=9,
        preemption=preemption,
        swap_cost_per_page=costs[0],
        recompute_cost_per_token=costs[1],
    )
    driver = driver_of(config)
    for name in "abc":
        driver.add(make_request(name, prompt_len=8, max_tokens=20))
    run(driver)
    counters = driver.scheduler.counters
    assert (counters.swapped > 0, counters.recomputed > 0) == (preemption == "swap", preemption == "recompute")


def test_without_host_pages_swapping_gives_way_to_recomputing() -> None:
    driver = driver_of(make_config(num_pages=9, num_host_pages=1, preemption="swap"))
    for name in "abc":
        driver.add(make_request(name, prompt_len=8, max_tokens=20))
    run(driver)
    assert driver.scheduler.counters.swapped == 0
    assert driver.scheduler.counters.recomputed > 0


def test_swapped_sequence_decodes_in_the_step_it_comes_back() -> None:
    driver = driver_of(make_config(num_pages=9, num_host_pages=9, preemption="swap"))
    for name in "abc":
        driver.add(make_request(name, prompt_len=8, max_tokens=20))
    step_until_preempted(driver)
    resumed: list[int] = []
    while not resumed:
        resumed = driver.scheduler.schedule().resumed.tolist()
        batch = driver.step()
    assert len(batch.swap_in) > 0
    assert set(resumed) <= set(batch.slots[: batch.num_decode].tolist())
    run(driver)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("n", [1, 2])
def test_preempted_in_the_middle_of_its_prompt(preemption: str, n: int) -> None:
    """Also with a single prompt token to come, which looks like a decode but is not one."""
    tokens_left = set()
    for prompt_len in (9, 10, 11):
        config = make_config(
            max_num_seqs=4,
            dense_batch_size=4,
            page_size=1,
            num_pages=prompt_len + 4,
            num_host_pages=20,
            preemption=preemption,
        )
        driver = driver_of(config)
        driver.add(make_request("old", prompt_len=2, max_tokens=10))
        driver.add(make_request("new", prompt_len=prompt_len, max_tokens=3, n=n))
        batches: list[Batch] = []
        while not driver.scheduler.num_preempted:
            batches.append(driver.step())
        assert driver.outputs["new", 0] == []
        tokens_left.add(prompt_len - sum(int((batch.token_slots == 1).sum()) for batch in batches))
        run(driver)
    assert tokens_left == {1, 2, 3}


def test_recomputation_is_chunked_and_samples_once() -> None:
    driver = driver_of(make_config(num_pages=9, dense_batch_size=8, preemption="recompute"))
    for name in "abc":
        driver.add(make_request(name, prompt_len=7, max_tokens=24))
    chunks = []
    for _ in range(400):
        if driver.idle:
            break
        batch = driver.step()
        rows = slice(batch.num_decode, None)
        if batch.num_tokens > batch.num_decode and (batch.token_ids[rows] == -1).all():
            chunks.append((batch.num_tokens - batch.num_decode, len(batch.sampling.rows) - batch.num_decode))
    driver.check_baseline()
    driver.check_outputs()
    assert (8, 0) in chunks  # a whole dense batch of a recomputation that samples nothing yet
    assert any(sampled == 1 for _, sampled in chunks)


def test_preempted_sequences_come_back_before_new_requests() -> None:
    driver = driver_of(make_config(num_pages=9))
    for name in "abc":
        driver.add(make_request(name, prompt_len=8, max_tokens=20))
    step_until_preempted(driver)
    driver.add(make_request("new", prompt_len=1, max_tokens=2))  # would fit at once
    while driver.scheduler.num_preempted:
        assert driver.scheduler.num_waiting == 1
        driver.step()
    run(driver)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_siblings_are_preempted_one_by_one(preemption: str) -> None:
    driver = driver_of(make_config(num_pages=10, num_host_pages=20, preemption=preemption))
    driver.add(make_request("r", prompt_len=10, max_tokens=20, n=3))
    _, preempted = step_until_preempted(driver)
    assert preempted == [("r", 2)]
    run(driver)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_abort_while_preempted(preemption: str) -> None:
    driver = driver_of(make_config(num_pages=9, num_host_pages=9, preemption=preemption))
    for name in "abc":
        driver.add(make_request(name, prompt_len=8, max_tokens=20))
    step_until_preempted(driver)
    driver.abort("c")
    assert driver.scheduler.num_preempted == 0
    assert driver.scheduler.num_free_host_pages == 9
    run(driver)


def test_a_sequence_that_needs_every_page_gets_them() -> None:
    """The oldest always goes on, whatever the others hold."""
    driver = driver_of(make_config(num_pages=8))
    driver.add(make_request("big", prompt_len=4, max_tokens=29))  # 32 cached tokens: all 8 pages
    for i in range(6):
        driver.add(make_request(f"small{i}", prompt_len=3, max_tokens=12))
    while ("big", 0) not in driver.done:
        before = len(driver.outputs["big", 0])
        driver.step()
        assert len(driver.outputs["big", 0]) > before or before == 0
    run(driver)


def test_a_right_prediction_preempts_nobody() -> None:
    """If every output is as long as expected, admission alone keeps memory from running out."""
    rng = np.random.default_rng(3)
    driver = Driver(make_config(num_pages=40))  # no EOS: outputs have max_tokens, which the prior exceeds
    for i in range(60):
        driver.add(make_request(f"r{i}", prompt_len=int(rng.integers(1, 20)), max_tokens=int(rng.integers(1, 30))))
    run(driver)
    assert driver.scheduler.counters.swapped + driver.scheduler.counters.recomputed == 0
    assert driver.scheduler.counters.steps < 60 * 15, "requests ran one after the other"


def test_prediction_counts_a_prompt_whose_first_sibling_has_left() -> None:
    driver = Driver(make_config(num_pages=12, max_num_seqs=4))
    driver.add(make_request("r", prompt_len=24, max_tokens=16, n=2))
    for _ in range(4):
        driver.step()
    driver.abort("r", 0)
    driver.add(make_request("next", prompt_len=8, max_tokens=16))  # 10 pages for the one that stays leave 2
    run(driver)
    assert driver.scheduler.counters.swapped + driver.scheduler.counters.recomputed == 0
