"""Whatever plan, batch size, page pool, neighbours, preemptions and aborts a request meets, its tokens are its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import write_model

from nf.engine import Engine
from nf.executors.cpu import CpuExecutor
from nf.graphs.plan import NanoOperation, PipelinePlan, Stream, nano_batch_plan, sequential_plan
from nf.models.declaration import Model, ModelWeights
from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.outputs import RequestOutput
from nf.request import Request
from nf.sampling_params import SamplingParams
from nf.scheduler.scheduler import Scheduler, SchedulerConfig
from nf.weights import load_weights

MAX_MODEL_LEN = 64
VOCAB_SIZE = 40

Tokens = dict[tuple[str, int], list[int]]
"""(request_id, index) → tokens of the sequence"""


@cache
def tiny_model() -> tuple[Model, ModelWeights]:
    with TemporaryDirectory() as folder:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
        path = write_model(Path(folder), tokenizer=False, vocab_size=VOCAB_SIZE, eos_token_id=None, **sizes)
        model = declare(read_config(path))
        return model, load_weights(model, path, np.dtype(np.float32))


@pytest.fixture(autouse=True, scope="module")
def hopeful_admission() -> Iterator[None]:
    """Outputs are expected to be short, so that memory runs out later and sequences are preempted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nf.scheduler.memory.PRIOR_OUTPUT_LEN", 3.0)
        yield


@dataclass(frozen=True)
class Case:
    """How a set of requests is run."""

    plan: PipelinePlan
    page_size: int
    num_pages: int
    num_host_pages: int
    max_num_seqs: int
    preemption: str = "auto"

    def start(self) -> tuple[Scheduler, CpuExecutor]:
        sizes: dict[str, Any] = {
            "page_size": self.page_size,
            "num_pages": self.num_pages,
            "num_host_pages": self.num_host_pages,
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": MAX_MODEL_LEN,
        }
        config = SchedulerConfig(
            dense_batch_size=self.plan.dense_batch_size,
            swap_cost_per_page=2.0,
            recompute_cost_per_token=1.0,
            preemption=self.preemption,  # type: ignore[arg-type]
            **sizes,
        )
        return Scheduler(config), CpuExecutor(*tiny_model(), self.plan, **sizes)

    def check_all_free(self, scheduler: Scheduler) -> None:
        scheduler.check()
        assert not scheduler.has_work
        assert scheduler.num_free_pages == self.num_pages
        assert scheduler.num_free_host_pages == self.num_host_pages


def synchronous_loop(case: Case, requests: list[Request]) -> Tokens:
    """The reference: schedule, run, wait, process; the host always knows every token."""
    scheduler, executor = case.start()
    tokens: Tokens = {(r.request_id, index): [] for r in requests for index in range(r.params.n)}
    by_id = {request.request_id: request for request in requests}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        batch = scheduler.apply(scheduler.schedule())
        owners = [scheduler.owner(slot) for slot in batch.sampling.slots.tolist()]
        for owner, token in zip(owners, executor.submit(batch).result().token_ids.tolist(), strict=True):
            tokens[owner].append(token)
            request = by_id[owner[0]]
            if token in request.stop_token_ids or len(tokens[owner]) == request.params.max_tokens:
                scheduler.finish(*owner)
    executor.close()
    case.check_all_free(scheduler)
    return tokens


def alone(request: Request) -> Tokens:
    """Tokens of a request that has the engine for itself, with memory to spare."""
    plan = sequential_plan(tiny_model()[0].operations, 128)
    return synchronous_loop(Case(plan, 16, 64, 0, 8), [request])


@dataclass(frozen=True)
class Arrival:
    """A request that comes after so many steps of the engine, and is aborted after so many more, or never."""

    request: Request
    after: int
    aborted_after: int | None


def asynchronous_engine(case: Case, arrivals: list[Arrival]) -> tuple[dict[str, RequestOutput], Scheduler]:
    """The engine under test: the last output of every request."""
    scheduler, executor = case.start()
    engine = Engine(scheduler, executor)

    async def steps(count: int) -> None:
        target = engine.stats.steps + count
        while engine.stats.steps < target and engine.num_requests:
            await asyncio.sleep(0)

    async def one(arrival: Arrival) -> RequestOutput:
        await steps(arrival.after)
        state = engine.add(arrival.request)
        if arrival.aborted_after is not None:
            await steps(arrival.aborted_after)
            engine.abort(arrival.request.request_id)
        return await engine.next_output(state)

    async def main() -> list[RequestOutput]:
        outputs = await asyncio.gather(*map(one, arrivals))
        await engine.close()
        return outputs

    outputs = asyncio.run(asyncio.wait_for(main(), timeout=60))
    case.check_all_free(scheduler)
    assert engine.stats.surplus_tokens <= sum(arrival.request.params.n for arrival in arrivals)
    return {output.request_id: output for output in outputs}, scheduler


@st.composite
def plans(draw: st.DrawFn, dense_batch_size: int) -> PipelinePlan:
    """The built-in plans, or one drawn: every operation cut in its own way, some a round late, on several streams.

    A drawn plan is an order of the operations of one round, dealt out to streams: the operations from ``late`` on work
    on the layer before and come first, and no stream changes the order, so nothing waits for what comes after it.
    """
    operations = tiny_model()[0].operations
    kind = draw(st.sampled_from(["sequential", "nano-batch", "drawn", "drawn"]))
    if kind == "sequential":
        return sequential_plan(operations, dense_batch_size)
    if kind == "nano-batch":
        return nano_batch_plan(operations, dense_batch_size)
    late = draw(st.integers(0, len(operations)))
    streams: list[list[NanoOperation]] = [[] for _ in range(draw(st.integers(1, 3)))]
    ranges: list[tuple[int, int]] = []
    for lag, part in ((1, operations[late:]), (0, operations[:late])):
        for operation in part:
            cuts = draw(st.sets(st.integers(1, dense_batch_size - 1), max_size=3))
            for nano_batch in draw(st.permutations(list(pairwise([0, *sorted(cuts), dense_batch_size])))):
                if nano_batch not in ranges:
                    ranges.append(nano_batch)
                stream = draw(st.integers(0, len(streams) - 1))
                streams[stream].append(NanoOperation(operation.name, ranges.index(nano_batch), lag))
    named = tuple(Stream(f"stream {i}", tuple(items)) for i, items in enumerate(streams) if items)
    return PipelinePlan("drawn", dense_batch_size, tuple(ranges), named)


@st.composite
def requests(draw: st.DrawFn, request_id: str, max_len: int, max_n: int) -> Request:
    """A request of at most ``max_len`` tokens that may end at several stop tokens."""
    temperature = draw(st.sampled_from([0.0, 0.8, 1.5]))
    prompt_len = draw(st.integers(1, max_len - 1))
    max_tokens = max_len - prompt_len - draw(st.integers(0, max_len - prompt_len - 1))
    stop = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2, unique=True))
    params = SamplingParams(
        n=1 if temperature == 0 else draw(st.integers(1, max_n)),
        temperature=temperature,
        top_k=draw(st.sampled_from([0, 5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(3, max_tokens))),
        stop_token_ids=stop,
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    prompt = np.random.default_rng(draw(st.integers(0, 99))).integers(0, VOCAB_SIZE, prompt_len, dtype=np.int32)
    assert params.seed is not None
    return Request(request_id, prompt, params, params.seed, tuple(sorted(stop)))


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Case, list[Arrival]]:
    """Requests that each fit into the pool, which may be just large enough for one of them."""
    max_num_seqs = draw(st.integers(2, 6))
    plan = draw(plans(draw(st.integers(max_num_seqs, 24))))
    page_size = draw(st.sampled_from([1, 2, 4, 8]))
    num_pages = -(-draw(st.sampled_from([24, 40, 60, 100])) // page_size)
    max_len = min(MAX_MODEL_LEN, num_pages * page_size)
    case = Case(
        plan,
        page_size,
        num_pages,
        num_host_pages=draw(st.sampled_from([2 * num_pages, num_pages // 2, 0])),
        max_num_seqs=max_num_seqs,
        preemption=draw(st.sampled_from(["swap", "auto", "recompute"])),
    )
    arrivals = [
        Arrival(
            draw(requests(f"r{index}", max_len, min(3, max_num_seqs))),
            after=draw(st.integers(0, 12)),
            aborted_after=draw(st.sampled_from([None, None, None, 0, 1, 2, 5, 15])),
        )
        for index in range(draw(st.integers(3, 8)))
    ]
    return case, arrivals


@settings(max_examples=40, deadline=None)
@given(workloads())
def test_every_request_is_answered_as_if_it_were_alone(workload: tuple[Case, list[Arrival]]) -> None:
    case, arrivals = workload
    expected: Tokens = {}
    for arrival in arrivals:
        expected |= alone(arrival.request)
    outputs, _ = asynchronous_engine(case, arrivals)
    for arrival in arrivals:
        output = outputs[arrival.request.request_id]
        assert output.finished
        for completion in output.outputs:
            tokens = expected[output.request_id, completion.index]
            if completion.finish_reason == "abort":
                assert arrival.aborted_after is not None
                tokens = tokens[: len(completion.token_ids)]
            assert completion.token_ids == tokens
    assert synchronous_loop(case, [arrival.request for arrival in arrivals]) == expected


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("n", [1, 3])
def test_preempted_requests_end_with_the_same_tokens(preemption: str, n: int) -> None:
    plan = nano_batch_plan(tiny_model()[0].operations, 16)
    case = Case(plan, page_size=4, num_pages=12, num_host_pages=32, max_num_seqs=6, preemption=preemption)
    arrivals = [
        Arrival(
            Request(
                f"r{index}",
                np.arange(index, index + 9, dtype=np.int32),
                SamplingParams(n=n, max_tokens=30, seed=index),
                seed=index,
            ),
            after=0,
            aborted_after=None,
        )
        for index in range(6)
    ]
    outputs, scheduler = asynchronous_engine(case, arrivals)
    for arrival in arrivals:
        expected = alone(arrival.request)
        for completion in outputs[arrival.request.request_id].outputs:
            assert completion.token_ids == expected[arrival.request.request_id, completion.index]
    counters = scheduler.counters
    assert (counters.swapped if preemption == "swap" else counters.recomputed) > 3
