"""The step loop: launched before awaited, one surplus token, aborts, failures; on an executor of known tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from engine_doubles import (
    EOS,
    FakeExecutor,
    byte_tokenizer,
    expected_tokens,
    hashed_token,
    make_loaded,
    make_request,
)

from nf.engine import Engine
from nf.errors import EngineError, InputError
from nf.outputs import RequestOutput
from nf.request import Request
from nf.scheduler.scheduler import Scheduler
from nf.sequence import RequestState


def make_engine(executor: FakeExecutor, **options: Any) -> tuple[Engine, Scheduler]:
    loaded = make_loaded(executor, **options)
    return Engine(loaded.scheduler, executor, loaded.tokenizer), loaded.scheduler


def run_with(engine: Engine, test: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a test and close the engine in the same event loop."""

    async def main() -> Any:
        try:
            return await test()
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(main(), timeout=20))


def run_all(engine: Engine, requests: list[Request]) -> list[RequestOutput]:
    async def main() -> list[RequestOutput]:
        states = [engine.add(request) for request in requests]
        return [await engine.next_output(state) for state in states]

    outputs: list[RequestOutput] = run_with(engine, main)
    return outputs


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def hopeful_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are expected to be short, so that memory runs out later and sequences are preempted."""
    monkeypatch.setattr("nf.scheduler.memory.PRIOR_OUTPUT_LEN", 4.0)


def ends_at(length: int) -> Callable[[int, int, int], int]:
    """Tokens of ``hashed_token``, but EOS from position ``length`` on."""
    return lambda seed, index, position: EOS if position >= length else hashed_token(seed, index, position)


def test_step_is_launched_before_its_predecessor_is_awaited() -> None:
    executor = FakeExecutor()
    engine, _ = make_engine(executor)
    (output,) = run_all(engine, [make_request("a", prompt_len=5, max_tokens=6)])
    assert len(output.outputs[0].token_ids) == 6
    at = {event: when for when, event in enumerate(executor.events)}
    assert len(executor.batches) == 6
    for step in range(5):
        assert at["submit", step + 1] < at["await", step]  # launched before anybody waits for the one before
    for step in range(4):
        assert at["await", step] < at["submit", step + 2]  # and never two steps ahead


def test_tokens_finish_reason_and_metrics() -> None:
    executor = FakeExecutor()
    engine, scheduler = make_engine(executor)
    requests = [make_request(name, prompt_len=length) for name, length in (("a", 3), ("b", 40), ("c", 7))]
    for request, output in zip(requests, run_all(engine, requests), strict=True):
        (completion,) = output.outputs
        assert completion.token_ids == expected_tokens(request)
        assert (completion.finish_reason, completion.stop_reason, completion.text) == ("length", None, "")
        assert output.finished
        metrics = output.metrics
        assert metrics.first_scheduled_time is not None
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        assert metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
    assert scheduler.num_free_pages == 64
    assert engine.stats.output_tokens == 24
    assert engine.stats.surplus_tokens == 0  # a length is known in advance
    assert engine.num_requests == 0


def test_eos_is_seen_one_step_late_and_costs_one_token() -> None:
    executor = FakeExecutor(ends_at(7))
    engine, scheduler = make_engine(executor)
    request = make_request("a", prompt_len=3, max_tokens=40)
    long = make_request("b", prompt_len=3, max_tokens=40, ignore_eos=True)
    output, _ = run_all(engine, [request, long])
    completion = output.outputs[0]
    assert completion.token_ids == expected_tokens(request, next_token=ends_at(7))
    assert completion.token_ids[-1] == EOS
    assert len(completion.token_ids) == 5
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert engine.stats.surplus_tokens == 1
    sampled = [seed for batch in executor.batches for seed in batch.sampling.seeds.tolist()]
    assert sampled.count(request.seed) == 6  # one more than shown
    assert scheduler.num_free_pages == 64


def test_surplus_of_many_sequences_is_at_most_one_each() -> None:
    def next_token(seed: int, index: int, position: int) -> int:
        return EOS if position > 3 and hashed_token(seed, index, position) % 5 == 0 else 65

    executor = FakeExecutor(next_token)
    engine, scheduler = make_engine(executor, max_num_seqs=8)
    requests = [make_request(f"r{i}", n=1 + i % 3, max_tokens=30, temperature=1.0) for i in range(12)]
    outputs = run_all(engine, requests)
    samples: dict[tuple[int, int], int] = {}
    for batch in executor.batches:
        rows = zip(batch.sampling.seeds.tolist(), batch.sampling.sample_index.tolist(), strict=True)
        for key in rows:
            samples[key] = samples.get(key, 0) + 1
    for request, output in zip(requests, outputs, strict=True):
        assert [completion.index for completion in output.outputs] == list(range(request.params.n))
        for completion in output.outputs:
            assert completion.token_ids == expected_tokens(request, completion.index, next_token)
            surplus = samples[request.seed, completion.index] - len(completion.token_ids)
            assert surplus in (0, 1)
            if completion.finish_reason == "length":
                assert surplus == 0
    assert engine.stats.surplus_tokens == sum(samples.values()) - engine.stats.output_tokens
    assert scheduler.num_free_pages == 64


def test_stop_token_is_named_and_an_id_may_be_used_again_while_its_surplus_token_is_in_flight() -> None:
    executor = FakeExecutor(lambda _seed, _index, position: 65 + position, manual=True)
    engine, _ = make_engine(executor)

    async def test() -> None:
        first = engine.add(make_request("a", prompt_len=3, stop_token_ids=[70], max_tokens=20))
        executor.run(3)  # positions 3, 4, 5: token 70 comes with the third step while the fourth is in flight
        output = await engine.next_output(first)
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", 70)
        assert output.outputs[0].token_ids == [68, 69, 70]
        again = engine.add(make_request("a", prompt_len=10, max_tokens=2))
        executor.run(100)
        assert (await engine.next_output(again)).outputs[0].token_ids == [75, 76]
        assert engine.stats.surplus_tokens == 1

    run_with(engine, test)


@pytest.mark.usefixtures("hopeful_admission")
@pytest.mark.parametrize("stage", ["queued", "prefill", "decode", "preempted"])
def test_abort_at_every_stage_frees_everything_and_harms_nobody(stage: str) -> None:
    executor = FakeExecutor(manual=True)
    sizes = {"max_num_seqs": 2, "num_pages": 12} if stage == "preempted" else {"max_num_seqs": 2}
    engine, scheduler = make_engine(executor, dense_batch_size=4, num_host_pages=8, **sizes)
    pages = scheduler.num_free_pages
    prompt_len = {"queued": 3, "prefill": 30, "decode": 3, "preempted": 4}[stage]
    max_tokens = 40 if stage == "preempted" else 20
    others = [make_request(name, prompt_len=3, max_tokens=max_tokens) for name in ("x", "y")]
    victim = make_request("victim", prompt_len=prompt_len, max_tokens=max_tokens)

    async def test() -> None:
        before = others if stage == "queued" else others[:1]
        states = [engine.add(request) for request in before]
        aborted = engine.add(victim)

        async def steps_until(condition: Callable[[], bool]) -> None:
            while not condition():
                awaited = executor.num_awaited
                executor.run()
                while executor.num_awaited == awaited:
                    await asyncio.sleep(0.001)

        if stage == "queued":
            await steps_until(lambda: len(executor.batches) == 4)
            assert aborted.metrics.first_scheduled_time is None
        elif stage == "prefill":
            await steps_until(lambda: aborted.metrics.first_scheduled_time is not None)
            assert aborted.metrics.first_token_time is None
        elif stage == "decode":
            await steps_until(lambda: len(aborted.sequences[0].token_ids) == 3)
        else:
            await steps_until(lambda: scheduler.num_preempted == 1)
            assert aborted.metrics.preemptions == 1
        engine.abort("victim")
        engine.abort("victim")  # an id that is gone is ignored
        output = await engine.next_output(aborted)
        assert output.outputs[0].finish_reason == "abort"
        assert output.finished
        shown = output.outputs[0].token_ids
        assert shown == expected_tokens(victim)[: len(shown)]
        states += [engine.add(request) for request in others if request not in before]
        executor.run(1000)
        for request, state in zip(others, states, strict=True):
            assert (await engine.next_output(state)).outputs[0].token_ids == expected_tokens(request)
        await until(lambda: not scheduler.has_work)
        assert scheduler.num_free_pages == pages
        assert scheduler.num_free_host_pages == 8
        assert aborted.output().outputs[0].token_ids == shown  # what was in flight is never shown
        scheduler.check()

    run_with(engine, test)


@pytest.mark.usefixtures("hopeful_admission")
def test_preempted_requests_finish_with_the_same_tokens() -> None:
    executor = FakeExecutor()
    engine, scheduler = make_engine(executor, num_pages=14, num_host_pages=6)
    requests = [make_request(f"r{i}", prompt_len=3 + i, max_tokens=30) for i in range(6)]
    outputs = run_all(engine, requests)
    for request, output in zip(requests, outputs, strict=True):
        assert output.outputs[0].token_ids == expected_tokens(request)
    preemptions = sum(output.metrics.preemptions for output in outputs)
    assert preemptions == scheduler.counters.swapped + scheduler.counters.recomputed > 0
    assert scheduler.num_free_pages == 14


@pytest.mark.parametrize("step", [0, 3])
def test_executor_failure_ends_everything_with_its_cause(step: int) -> None:
    executor = FakeExecutor(fail_at=step)
    engine, _ = make_engine(executor)

    async def test() -> None:
        states = [engine.add(make_request(name, max_tokens=20), stream=name == "a") for name in ("a", "b", "c")]

        async def outcome(state: RequestState) -> BaseException:
            async def to_the_end() -> None:
                while not (await engine.next_output(state)).finished:
                    pass

            with pytest.raises(EngineError, match="illegal address") as failure:
                await to_the_end()
            return failure.value

        errors = await asyncio.gather(*map(outcome, states))
        for error in errors:
            assert isinstance(error.__cause__, RuntimeError)
        assert len({id(error) for error in errors}) == 3
        with pytest.raises(EngineError, match="takes no more requests") as refused:
            engine.add(make_request("d"))
        assert isinstance(refused.value.__cause__, RuntimeError)
        assert engine.num_requests == 0
        await engine.close()

    run_with(engine, test)
    assert executor.num_closes == 1


def test_close_aborts_what_is_in_flight_and_may_be_called_again() -> None:
    executor = FakeExecutor(manual=True)
    engine, scheduler = make_engine(executor)

    async def test() -> None:
        states = [engine.add(make_request(name, max_tokens=30)) for name in ("a", "b")]
        executor.run(3)
        await until(lambda: len(states[0].sequences[0].token_ids) == 3)
        asyncio.get_running_loop().call_later(0.01, executor.run, 100)
        await asyncio.gather(engine.close(), engine.close())
        for state in states:
            output = await engine.next_output(state)
            assert output.outputs[0].finish_reason == "abort"
            assert len(output.outputs[0].token_ids) == 3
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            engine.add(make_request("c"))

    run_with(engine, test)
    assert executor.num_closes == 1
    assert scheduler.num_free_pages == 64


def test_close_without_any_request() -> None:
    executor = FakeExecutor()
    engine, _ = make_engine(executor)

    async def test() -> None:
        await engine.close()

    run_with(engine, test)
    assert executor.num_closes == 1


def test_idle_engine_sleeps_and_wakes() -> None:
    executor = FakeExecutor()
    engine, scheduler = make_engine(executor)
    calls = 0
    schedule = scheduler.schedule

    def counted() -> Any:
        nonlocal calls
        calls += 1
        return schedule()

    scheduler.schedule = counted  # type: ignore[method-assign]

    async def test() -> None:
        request = make_request("a")
        assert (await engine.next_output(engine.add(request))).outputs[0].token_ids == expected_tokens(request)
        after = calls
        await asyncio.sleep(0.05)
        assert calls <= after + 1
        request = make_request("b")
        assert (await engine.next_output(engine.add(request))).outputs[0].token_ids == expected_tokens(request)

    run_with(engine, test)


def test_nan_ends_that_sequence_alone() -> None:
    bad = make_request("bad", n=2, temperature=1.0)
    good = make_request("good")

    def next_token(seed: int, index: int, position: int) -> int:
        nan = seed == bad.seed and index == 1 and position >= 5
        return -1 if nan else hashed_token(seed, index, position)

    executor = FakeExecutor(next_token)
    engine, scheduler = make_engine(executor)
    output, neighbour = run_all(engine, [bad, good])
    assert [completion.finish_reason for completion in output.outputs] == ["length", "error"]
    assert output.outputs[0].token_ids == expected_tokens(bad, 0)
    assert output.outputs[1].token_ids == expected_tokens(bad, 1)[:2]
    assert output.error is not None
    assert output.error.startswith("output token 3 of continuation 1 cannot be sampled: the model's logits hold a NaN")
    assert neighbour.outputs[0].token_ids == expected_tokens(good)
    assert neighbour.error is None
    assert scheduler.num_free_pages == 64


class BrokenTokenizer:
    """A tokenizer with a bug that one token brings out."""

    def __init__(self, bad_token: int) -> None:
        self._bad_token = bad_token
        self._tokenizer = byte_tokenizer()
        self.num_decodes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **how: Any) -> str:
        self.num_decodes += 1
        if self._bad_token in ids:
            raise ZeroDivisionError("no such text")
        return self._tokenizer.decode(ids, **how)


@pytest.mark.parametrize("stop", [None, ["never"]])
def test_failure_in_one_requests_text_is_its_own(stop: list[str] | None) -> None:
    bad, good = make_request("bad", stop=stop), make_request("good", stop=stop)

    def next_token(seed: int, index: int, position: int) -> int:
        return 7 if seed == bad.seed and position == 6 else hashed_token(seed, index, position)

    executor = FakeExecutor(next_token)
    engine, scheduler = make_engine(executor, tokenizer=BrokenTokenizer(7))
    output, neighbour = run_all(engine, [bad, good])
    assert output.outputs[0].finish_reason == "error"
    assert output.error is not None
    assert "no such text" in output.error
    assert neighbour.outputs[0].text == bytes(expected_tokens(good)).decode()
    assert neighbour.outputs[0].finish_reason == "length"
    assert scheduler.num_free_pages == 64
    assert engine.num_requests == 0


def test_nobody_looking_costs_no_detokenization() -> None:
    tokenizer = BrokenTokenizer(-1)
    executor = FakeExecutor(manual=True)
    engine, _ = make_engine(executor, tokenizer=tokenizer)

    async def test() -> None:
        state = engine.add(make_request("a", max_tokens=30))
        executor.run(25)
        await until(lambda: len(state.sequences[0].token_ids) == 25)
        assert tokenizer.num_decodes == 0
        executor.run(100)
        output = await engine.next_output(state)
        assert output.outputs[0].text == bytes(output.outputs[0].token_ids).decode()

    run_with(engine, test)


def test_duplicate_id_is_refused() -> None:
    executor = FakeExecutor(manual=True)
    engine, _ = make_engine(executor)

    async def test() -> None:
        state = engine.add(make_request("a"))
        with pytest.raises(InputError, match="request_id: 'a' is already in flight"):
            engine.add(make_request("a"))
        executor.run(100)
        await engine.next_output(state)

    run_with(engine, test)


def test_request_that_can_never_fit_fails_alone() -> None:
    executor = FakeExecutor()
    engine, scheduler = make_engine(executor, num_pages=6)

    async def test() -> None:
        good = make_request("good")
        state = engine.add(good)
        with pytest.raises(InputError, match="KV pages"):
            engine.add(make_request("huge", prompt_len=30, max_tokens=30))
        assert (await engine.next_output(state)).outputs[0].token_ids == expected_tokens(good)
        assert scheduler.num_free_pages == 6

    run_with(engine, test)


def test_logprobs_and_prompt_logprobs() -> None:
    executor = FakeExecutor()
    engine, _ = make_engine(executor, tokenizer=byte_tokenizer())
    request = make_request("a", prompt_len=20, logprobs=2, prompt_logprobs=1)
    plain = make_request("b")
    output, other = run_all(engine, [request, plain])
    completion = output.outputs[0]
    assert completion.logprobs is not None
    for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        assert set(logprobs) == {token, 0, 1}
        assert (logprobs[token].logprob, logprobs[token].rank) == (-token, token + 1)
        assert logprobs[token].decoded_token == chr(token)
        assert (logprobs[1].logprob, logprobs[1].rank) == (-1.0, 2)
    assert completion.cumulative_logprob == -sum(completion.token_ids)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position, logprobs in enumerate(output.prompt_logprobs[1:], start=1):
        assert logprobs is not None
        assert set(logprobs) == {position, 0}
        assert logprobs[position].logprob == -position
    assert other.outputs[0].logprobs is None
    assert other.outputs[0].cumulative_logprob is None
    assert other.prompt_logprobs is None


TEXT = "One two STOP three."


def spells(text: str) -> Callable[[int, int, int], int]:
    """After a prompt of three tokens, the bytes of ``text`` and then EOS."""
    data = text.encode()
    return lambda _seed, _index, position: data[position - 3] if position - 3 < len(data) else EOS


@pytest.mark.parametrize(
    ("params", "text", "reason", "num_tokens"),
    [
        ({}, TEXT, None, 20),
        ({"stop": "STOP"}, "One two ", "STOP", 12),
        ({"stop": ["three", "STOP"], "include_stop_str_in_output": True}, "One two STOP", "STOP", 12),
        ({"stop": ["o", "O"], "min_tokens": 7}, "One two ST", "O", 11),
        ({"stop_token_ids": [ord("w")]}, "One t", ord("w"), 6),
        ({"stop_token_ids": [ord("w")], "include_stop_str_in_output": True}, "One tw", ord("w"), 6),
        ({"skip_special_tokens": False}, TEXT, None, 20),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, TEXT + "<|end|>", None, 20),
        ({"detokenize": False}, "", None, 20),
        ({"stop": "three.!"}, TEXT, None, 20),
    ],
)
def test_text_and_what_ends_it(params: dict[str, Any], text: str, reason: str | int | None, num_tokens: int) -> None:
    engine, _ = make_engine(FakeExecutor(spells(TEXT)), tokenizer=byte_tokenizer())
    (output,) = run_all(engine, [make_request("a", max_tokens=40, **params)])
    (completion,) = output.outputs
    assert completion.text == text
    assert (completion.finish_reason, completion.stop_reason) == ("stop", reason)
    assert len(completion.token_ids) == num_tokens


def test_stop_string_that_completes_with_the_last_token_counts() -> None:
    engine, _ = make_engine(FakeExecutor(spells(TEXT)), tokenizer=byte_tokenizer())
    (output,) = run_all(engine, [make_request("a", max_tokens=12, stop="STOP")])
    assert (output.outputs[0].finish_reason, output.outputs[0].text) == ("stop", "One two ")


def test_part_of_a_stop_string_is_shown_in_the_end() -> None:
    engine, _ = make_engine(FakeExecutor(spells(TEXT)), tokenizer=byte_tokenizer())
    (output,) = run_all(engine, [make_request("a", max_tokens=10, stop="STOP")])
    assert (output.outputs[0].finish_reason, output.outputs[0].text) == ("length", "One two ST")


def test_event_loop_torn_down_without_close() -> None:
    executor = FakeExecutor()
    engine, _ = make_engine(executor)

    async def forgetful() -> None:
        engine.add(make_request("a", max_tokens=60))
        await asyncio.sleep(0)

    asyncio.run(forgetful())

    async def later() -> None:
        with pytest.raises(EngineError, match="event loop ended"):
            engine.add(make_request("b"))
        await engine.close()

    asyncio.run(later())
    assert executor.num_closes == 1


def test_one_engine_serves_one_loop() -> None:
    executor = FakeExecutor()
    engine, _ = make_engine(executor)

    async def use() -> None:
        await engine.next_output(engine.add(make_request("a")))

    runner = asyncio.Runner()
    runner.run(use())
    with pytest.raises(EngineError, match="another event loop"):
        asyncio.run(use())
    runner.run(engine.close())
    runner.close()
