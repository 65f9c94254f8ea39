"""The GPU executor from opening to closing: poisoned pages, failures, traces, and what is left behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from executor_cases import Part
from executor_runs import DENSE, ERROR, MODEL, PROMPT, WEIGHTS, last_logits, nothing, pairs, random_sequences, tokens_of
from gpu_runs import MAX_LEN, gpu_executor, maker, map_weights, model_for_gpu, relative_error, weights_for_gpu

from nf.errors import EngineError, ModelError
from nf.executors import gpu_trace
from nf.graphs.plan import nano_batch_plan, unroll
from nf.kernels.device import Device, DeviceMemoryError

pytestmark = pytest.mark.gpu


POISON = 50


def test_nan_reaches_no_neighbour_and_no_later_owner_of_the_page() -> None:
    """A poisonous token yields −1; others, also on the pages it leaves behind, get what they always get."""
    embed = WEIGHTS.embed.copy()
    embed[POISON] = np.nan
    poisoned = map_weights(WEIGHTS, lambda array: embed if array is WEIGHTS.embed else array)
    prompt = [token for token in PROMPT if token != POISON]
    rows = np.arange(len(prompt), dtype=np.int32)
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        clean = run.logits(batches.batch([Part(0, 0, prompt)]), rows)
    batches = maker()
    with gpu_executor(MODEL, poisoned, nano_batch_plan(MODEL.operations, DENSE)) as run:
        parts = [Part(1, 0, [7, POISON, *[9] * 20]), Part(0, 0, prompt)]
        result = tokens_of(run, batches.batch(parts))
        assert result == [-1, int(clean[-1].argmax())]
        after = tokens_of(run, batches.batch([Part(1, 22, [-1], decode=True)]))  # launched before anyone knew
        assert after == [-1]
        batches.tables[2] = batches.tables[1]
        again = run.logits(batches.batch([Part(2, 0, prompt)]), rows)
    assert relative_error(again, clean) <= ERROR / 2


def test_a_failure_is_delivered_by_its_handle_and_every_later_one() -> None:
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, 16) as run:
        before = run.submit(batches.batch([Part(0, 0, PROMPT[:10])]))
        bad = run.submit(batches.batch([Part(1, 0, PROMPT)]))  # more tokens than the dense batch has
        after = run.submit(batches.batch([Part(2, 0, PROMPT[:10])]))
        assert before.exception() is None
        assert bad.exception() is not None
        assert after.exception() is bad.exception()


def test_close_finishes_what_was_submitted_and_can_be_repeated() -> None:
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        handles = [run.submit(batches.batch([Part(0, 0, PROMPT)])) for _ in range(12)]
        run.close()
        run.close()
        assert not own_threads()
        assert len({int(handle.result().token_ids[0]) for handle in handles}) == 1
        with pytest.raises(EngineError, match="closed"):
            run.submit(batches.batch([Part(0, 0, PROMPT)]))


def test_a_step_may_hold_no_tokens_and_sample_nothing() -> None:
    batches = maker()
    with gpu_executor(MODEL, WEIGHTS, DENSE) as run:
        assert tokens_of(run, batches.batch([], swap_out=pairs((0, 0)))) == []
        assert tokens_of(run, batches.batch([Part(0, 0, PROMPT[:9])], nothing())) == []
        batch = batches.batch([Part(0, 9, PROMPT[9:])])
        logits = run.logits(batch, np.array([len(PROMPT) - 10], np.int32))
    assert relative_error(logits, last_logits(PROMPT)[None]) <= ERROR


def test_a_traced_step_tells_of_every_nano_operation_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_trace, "WARM_SECONDS", 0.05)
    plan, sequences = nano_batch_plan(MODEL.operations, DENSE), random_sequences(8)
    batch = maker().batch([Part(slot, 0, (sequences[slot] * MAX_LEN)[:145]) for slot in range(2)])
    with gpu_executor(MODEL, WEIGHTS, plan) as run:
        before = tokens_of(run, batch)
        spans = run.trace(batch)
        assert tokens_of(run, batch) == before
        run.close()
        with pytest.raises(EngineError, match="closed"):
            run.trace(batch)
    steps = unroll(plan, MODEL.operations, MODEL.config.num_layers)
    names = [f"{step.operation.name} [{step.start}, {step.stop}) layer {step.layer}" for step in steps]
    assert [span.name for span in spans] == ["embed and plan", *names, "logits", "sampling"]
    assert {span.stream for span in spans} == {"step", *(stream.name for stream in plan.streams)}
    assert all(span.start_us >= 0 and span.duration_us >= 0 for span in spans)
    assert max(spans, key=lambda span: span.start_us).name == "sampling"


@pytest.mark.alone
def test_a_model_without_kernels_leaves_nothing_behind() -> None:
    model = model_for_gpu(qkv_bias=True, o_bias=True)
    weights, device = weights_for_gpu(model, 0), Device()
    free = device.memory()[0]
    with pytest.raises(ModelError, match=r"^o_bias: "), gpu_executor(model, weights, DENSE):
        pass
    assert device.memory()[0] >= free - (32 << 20)


@pytest.mark.alone
def test_opening_and_closing_leaves_nothing_behind() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def use() -> None:
        with gpu_executor(MODEL, WEIGHTS, nano_batch_plan(MODEL.operations, DENSE)) as run:
            tokens_of(run, maker().batch([Part(0, 0, PROMPT)]))

    use()
    gc.collect()
    device = Device()
    free, files = device.memory()[0], open_files()
    for _ in range(20):
        use()
    gc.collect()
    assert device.memory()[0] >= free - (16 << 20)  # less than a megabyte each: also what was loaded is unloaded
    assert open_files() == files
    assert not own_threads()


def own_threads() -> list[threading.Thread]:
    """The engine's threads that are still there a second after their ends."""
    for thread in threading.enumerate():
        if thread.name.startswith("nf-"):
            thread.join(timeout=1)
    return [thread for thread in threading.enumerate() if thread.name.startswith("nf-")]


@pytest.mark.alone
def test_too_many_pages_say_how_much_memory_there_is() -> None:
    free = Device().memory()[0]
    with (
        pytest.raises(DeviceMemoryError, match=r"KV pages need \d+\.\d\d GiB of GPU memory, and .* are free"),
        gpu_executor(MODEL, WEIGHTS, DENSE, num_pages=1 << 26),
    ):
        pass
    assert Device().memory()[0] >= free - (64 << 20)
