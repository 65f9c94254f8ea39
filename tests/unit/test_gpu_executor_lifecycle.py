"""What the GPU executor does around its kernels, on doubles of everything below it: order, failures, closing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nf.config import ModelConfig
from nf.errors import EngineError, ModelError, PlanError
from nf.executors import gpu
from nf.executors.base import StepResult
from nf.executors.gpu import MAX_IN_FLIGHT, GpuExecutor
from nf.graphs.plan import PipelinePlan, load_plan, sequential_plan
from nf.kernels.device import CudaError, DeviceMemoryError
from nf.models.declaration import Model
from nf.models.registry import declare

MODEL = declare(ModelConfig("LlamaForCausalLM", 64, 64, 128, 2, 4, 2, 64, 1e-5, 64))


def step(num_tokens: int = 0, num_decode: int = 0) -> Any:
    """As much of a Batch as the executor itself looks at."""
    prompts = SimpleNamespace(rows=[])
    keys = 100 * num_decode
    return SimpleNamespace(num_tokens=num_tokens, num_decode=num_decode, decode_keys=keys, prompt_logprobs=prompts)


class Card:
    """What the doubles share: a clock that every event advances, what was launched and freed, when results come."""

    def __init__(self) -> None:
        self.clock = 0
        self.held: list[str] = ["weights"]  # what nobody has freed
        self.captured: list[tuple[int, bool]] = []  # capacity, whether prefill chunks are attended
        self.launched: list[tuple[int, bool]] = []
        self.freed: list[str] = []
        self.results: list[Future[Any]] = []
        self.refuses_to_free = False
        self.refuses_to_move = False
        self.waited_before_freeing = False
        self.fails_at, self.fails_after = "", 0

    def owner(self, name: str) -> Any:
        def free() -> None:
            self.freed.append(name)
            self.held.remove(name)
            if self.refuses_to_free:
                raise CudaError("the driver answered CUDA_ERROR_ILLEGAL_ADDRESS")

        return free

    def made(self, name: str, **attributes: Any) -> Any:
        """Something that its maker has to free; making it fails where a test says so."""
        if name == self.fails_at and self.held.count(name) == self.fails_after:
            raise DeviceMemoryError(f"{name}: there is no memory left")
        self.held.append(name)
        return SimpleNamespace(free=self.owner(name), **attributes)

    def loader(self, _artifacts: Any) -> Any:
        loaded = ExitStack()
        return SimpleNamespace(load=lambda: loaded.callback(self.made("kernels").free), free=loaded.close)

    def kernels(self, loader: Any, *_: Any, **__: Any) -> Any:
        loader.load()
        return SimpleNamespace(page_copy=None)

    def event(self, *, timing: bool) -> Any:
        assert timing
        event = self.made("event", at=0)

        def record(_stream: int) -> None:
            self.clock += 1
            event.at = self.clock

        event.record, event.since = record, lambda other: float(event.at - other.at)
        return event

    def download(self, _batch: Any, _stream: int) -> Any:
        future: Future[Any] = Future()
        self.results.append(future)
        return SimpleNamespace(result=future.result)

    def wait(self) -> None:
        self.waited_before_freeing = not self.freed
        if self.refuses_to_free:
            raise CudaError("the driver answered CUDA_ERROR_ILLEGAL_ADDRESS")

    def move(self, *_: Any) -> None:
        if self.refuses_to_move:
            raise CudaError("the driver answered CUDA_ERROR_INVALID_VALUE")

    def memory(self, *arguments: Any, **__: Any) -> Any:
        (undo,) = (each for each in arguments if isinstance(each, ExitStack))
        undo.callback(self.made("memory").free)
        return SimpleNamespace(
            inputs=SimpleNamespace(upload=lambda *_: None, pointers={}),
            outputs=SimpleNamespace(download=self.download),
        )

    def capture(self, steps: Any, _lanes: Any, origin: int, **__: Any) -> Any:
        serves = steps[0].stop, "prefill_attention" in {step.operation.name for step in steps}
        self.captured.append(serves)

        def launch(stream: int) -> None:
            assert stream == origin
            self.launched.append(serves)

        return self.made("graph", launch=launch, upload=lambda _: None)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    doubles = {
        "KernelLoader": card.loader,
        "LayerKernels": card.kernels,
        "Layers": lambda *_: SimpleNamespace(begin=None, launch=None, finish=None),
        "Stream": lambda: card.made("stream", handle=7, synchronize=card.wait),
        "Event": card.event,
        "KvPages": lambda *_, **__: card.made("pages", page_bytes=1, move=card.move),
        "step_memory": card.memory,
        "capture": card.capture,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(gpu, name, double)
    return card


def executor(
    card: Card, dense_batch_size: int = 8, model: Model = MODEL, stored: Sequence[PipelinePlan] = ()
) -> GpuExecutor:
    return GpuExecutor(
        model,
        SimpleNamespace(free=card.owner("weights")),  # type: ignore[arg-type]
        [load_plan("sequential", MODEL.operations, dense_batch_size), *stored],
        device=SimpleNamespace(sms=132, use=lambda: None),  # type: ignore[arg-type]
        artifacts=[],
        page_size=16,
        num_pages=4,
        num_host_pages=0,
        max_num_seqs=4,
        max_model_len=64,
    )


def result(token: int) -> StepResult:
    return StepResult(np.array([token], np.int32), None, None)


def test_steps_end_in_the_order_they_were_submitted(card: Card) -> None:
    runs = executor(card)
    handles = [runs.submit(step()) for _ in range(3)]
    card.results[1].set_result(result(1))
    assert not wait(handles, timeout=0.05).done
    card.results[0].set_result(result(0))
    card.results[2].set_result(result(2))
    assert [int(handle.result(timeout=5).token_ids[0]) for handle in handles] == [0, 1, 2]
    assert not any(handle.cancel() for handle in handles)
    runs.close()
    # The clock ticks at the start and at the end of every step.
    assert (runs.times.busy, runs.times.idle) == (3.0, 2.0)


def test_a_failure_is_delivered_by_its_step_and_every_later_one(card: Card) -> None:
    runs = executor(card)
    first, second = runs.submit(step()), runs.submit(step())
    card.results[0].set_exception(CudaError("illegal address"))
    with pytest.raises(CudaError, match="illegal address"):
        first.result(timeout=5)
    card.results[1].set_exception(CudaError("illegal address"))
    with pytest.raises(CudaError):
        second.result(timeout=5)
    launched = len(card.results)
    with pytest.raises(CudaError, match="illegal address"):
        runs.submit(step()).result(timeout=5)
    assert len(card.results) == launched
    card.refuses_to_free = True  # as a driver does after a failed kernel
    runs.close()
    assert card.held == []


def test_a_step_that_cannot_be_enqueued_fails_and_later_ones_neither_run_nor_wait(card: Card) -> None:
    runs = executor(card)
    before = runs.submit(step())
    card.refuses_to_move = True
    bad = runs.submit(step())
    after = [runs.submit(step()) for _ in range(2 * MAX_IN_FLIGHT)]
    card.results[0].set_result(result(3))
    assert int(before.result(timeout=5).token_ids[0]) == 3
    assert isinstance(bad.exception(timeout=0), CudaError)
    assert {handle.exception(timeout=0) for handle in after} == {bad.exception()}
    assert len(card.results) == 1
    card.waited_before_freeing = False
    runs.close()
    assert card.waited_before_freeing  # the bad step's part that was enqueued
    assert card.held == []


def test_the_first_failure_is_the_one_that_is_told(card: Card) -> None:
    runs = executor(card)
    first = runs.submit(step())
    card.results[0].set_exception(CudaError("illegal address"))
    with pytest.raises(CudaError, match="illegal address"):
        first.result(timeout=5)
    card.refuses_to_move = True
    with pytest.raises(CudaError, match="illegal address"):
        runs.submit(step()).result(timeout=5)
    runs.close()


def test_closing_waits_frees_once_and_ends_submission(card: Card) -> None:
    runs = executor(card)
    handle = runs.submit(step())
    threading.Timer(0.05, card.results[0].set_result, [result(5)]).start()
    runs.close()
    assert int(handle.result(timeout=0).token_ids[0]) == 5
    assert card.held == []
    assert card.freed[-2:] == ["kernels", "weights"]  # after the graphs that have them and all that may read them
    runs.close()
    calls: list[Callable[[], Any]] = [
        lambda: runs.submit(step()),
        lambda: runs.trace(step()),
        lambda: runs.randomize_kv(0),
    ]
    for call in calls:
        with pytest.raises(EngineError, match=r"^the executor is closed$"):
            call()


@pytest.mark.parametrize(
    ("fails_at", "fails_after"),
    [
        ("stream", 0),
        ("pages", 0),
        ("kernels", 0),
        ("memory", 0),
        ("event", 0),
        ("event", 9),
        ("graph", 0),
        ("graph", 2),
    ],
)
def test_a_failed_start_frees_what_it_had(card: Card, fails_at: str, fails_after: int) -> None:
    card.fails_at, card.fails_after = fails_at, fails_after
    with pytest.raises(DeviceMemoryError, match=fails_at):
        executor(card, dense_batch_size=40)
    assert card.held == []


def test_a_model_without_kernels_is_refused_before_anything_is_allocated(card: Card) -> None:
    biased = declare(replace(MODEL.config, qkv_bias=True, o_bias=True))
    with pytest.raises(ModelError, match=r"^o_bias: must be false on a GPU"):
        executor(card, model=biased)
    card.held.append("weights")
    alien = replace(MODEL, operations=(replace(MODEL.operations[0], name="layer_norm"), *MODEL.operations[1:]))
    with pytest.raises(ModelError, match=r"^operations: 'layer_norm' is not one of attn_norm, "):
        executor(card, model=alien)
    assert (card.held, set(card.freed)) == ([], {"weights"})


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_allocated(card: Card) -> None:
    mixtral = declare(ModelConfig("MixtralForCausalLM", 64, 64, 128, 2, 4, 2, 64, 1e-5, 64, num_experts=8))
    with pytest.raises(PlanError):
        executor(card, model=mixtral)
    assert card.freed == ["weights"]


def test_no_more_steps_are_in_flight_than_there_are_events_to_time_them(card: Card) -> None:
    runs = executor(card)
    handles = [runs.submit(step()) for _ in range(MAX_IN_FLIGHT)]
    blocked = threading.Thread(target=lambda: handles.append(runs.submit(step())))
    blocked.start()
    blocked.join(timeout=0.1)
    assert blocked.is_alive()
    card.results[0].set_result(result(0))
    blocked.join(timeout=5)
    assert not blocked.is_alive()
    for future in card.results[1:]:
        future.set_result(result(1))
    assert wait(handles, timeout=5).done == set(handles)
    runs.close()
    assert (runs.times.busy, runs.times.idle) == (MAX_IN_FLIGHT + 1.0, float(MAX_IN_FLIGHT))


def test_a_step_replays_the_graph_of_its_size_and_kind_and_an_empty_one_none(card: Card) -> None:
    runs = executor(card, dense_batch_size=40)
    assert sorted(card.captured) == [(16, False), (16, True), (32, False), (32, True), (40, False), (40, True)]
    sizes = (0, 1, 16, 17, 32, 33, 40)
    steps = [*(step(tokens, max(0, tokens - 1)) for tokens in sizes), *(step(tokens, tokens) for tokens in sizes)]
    for index, one in enumerate(steps):
        runs.submit(one)
        card.results[index].set_result(result(0))
    runs.close()
    with_prompts = [(16, True)] * 2 + [(32, True)] * 2 + [(40, True)] * 2
    assert card.launched == with_prompts + [(16, False)] * 2 + [(32, False)] * 2 + [(40, False)] * 2


def test_plans_that_do_the_same_work_share_a_graph(card: Card) -> None:
    """As the sequential plan for any step and one that a search stored for some."""
    loads = (((20, 100),), ((40, 100),))  # the second only decodes
    runs = executor(card, 40, stored=[replace(sequential_plan(MODEL.operations, 40), loads=each) for each in loads])
    assert sorted(card.captured) == [(16, False), (16, True), (32, False), (32, True), (40, False), (40, True)]
    for decodes in (0, 20, 40):
        handle = runs.submit(step(40, decodes))
        card.results[-1].set_result(None)
        handle.result()
    assert card.launched == [(40, True), (40, True), (40, False)]
    runs.close()
    assert card.freed.count("graph") == 6
