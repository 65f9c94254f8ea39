"""What a GPU executor allocates for its steps: no more than loading reckons with, and given back whatever fails."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import device_double
import numpy as np
import pytest

from nf.config import ModelConfig
from nf.executors import gpu_buffers, gpu_inputs, gpu_memory, gpu_outputs
from nf.executors.gpu_buffers import Sizes
from nf.executors.gpu_memory import RESERVED_BYTES, Memory, step_memory, workspace_bytes
from nf.executors.rope import rotary_table
from nf.graphs.plan import BUILT_IN, PipelinePlan
from nf.graphs.pool import step_plans
from nf.kernels import sampling
from nf.models.declaration import Model
from nf.models.registry import declare
from nf.models.shapes import SHAPES

MODULES = (gpu_buffers, gpu_inputs, gpu_memory, gpu_outputs)
SMS = 132
SMALL = declare(ModelConfig("LlamaForCausalLM", 64, 64, 128, 2, 4, 2, 64, 1e-5, 64))


class DeviceBytes(device_double.Memory):
    """With what the tests need of DeviceMemory."""

    def upload(self, array: np.ndarray[Any, Any], offset: int) -> None:
        end = offset + array.nbytes
        assert end <= self.num_bytes
        self.array[offset:end] = array.reshape(-1).view(np.uint8)


class Counted:
    """Bytes that are counted and not there."""

    def __init__(self, num_bytes: int, _purpose: str) -> None:
        self.num_bytes, self.pointer = num_bytes, 1 << 40
        device_double.LIVE.append(self)

    def zero(self) -> Counted:
        return self

    def upload(self, array: np.ndarray[Any, Any], offset: int) -> None:
        assert offset + array.nbytes <= self.num_bytes

    def free(self) -> None:
        device_double.LIVE.remove(self)


def make(model: Model, plans: Sequence[PipelinePlan], sizes: Sizes, undo: ExitStack, num_host_pages: int = 3) -> Memory:
    config = model.config
    loader: Any = SimpleNamespace(cuda=lambda *_, **__: None)
    sampler = sampling.Sampler(loader, "fp32", vocab_size=config.vocab_size, tokens_stride=8, sms=SMS)
    kernels: Any = SimpleNamespace(sampler=sampler)
    pages: Any = SimpleNamespace(pointer=1 << 30, layer_bytes=1 << 20)
    weights: Any = None
    return step_memory(
        config,
        [step.plan for step in step_plans(plans, model.operations)],
        sizes,
        kernels,
        weights,
        pages,
        undo,
        num_host_pages=num_host_pages,
        sms=SMS,
    )


def install(monkeypatch: pytest.MonkeyPatch, memory: type) -> None:
    for module in MODULES:
        device_double.install(monkeypatch, module)
        if hasattr(module, "DeviceMemory"):
            monkeypatch.setattr(module, "DeviceMemory", memory)


def test_whichever_allocation_fails_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DeviceBytes)

    def made() -> Any:
        with ExitStack() as undo:
            make(SMALL, [BUILT_IN["sequential"](SMALL.operations, 40)], Sizes(40, 6, 64, 16), undo)
            kept = undo.pop_all()
        return SimpleNamespace(free=kept.close)

    device_double.check_that_failures_leave_nothing(made)


def test_tables_that_never_change_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DeviceBytes)
    with ExitStack() as undo:
        buffers = make(SMALL, [BUILT_IN["nano-batch"](SMALL.operations, 40)], Sizes(40, 6, 64, 16), undo).buffers
        found = device_double.at(buffers["rotary"], (65, 32, 2), np.float32)
        cosines, sines = rotary_table(SMALL.config.rope, 64, 65)
        np.testing.assert_array_equal(found[..., 0], cosines)
        np.testing.assert_array_equal(found[..., 1], sines)
        assert not device_double.at(buffers["tokens"], (6, 65), np.int32).any()


@pytest.mark.parametrize("names", [["sequential"], ["nano-batch"], ["sequential", "nano-batch"]], ids="+".join)
@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"llama-3.1-405b"}))  # no kernels for that one
def test_no_more_is_taken_than_loading_leaves(monkeypatch: pytest.MonkeyPatch, name: str, names: list[str]) -> None:
    """All but what is reserved for kernels, graphs and the context."""
    install(monkeypatch, Counted)
    model, seqs, length = declare(SHAPES[name]), 2048, 8192
    chosen = [BUILT_IN[plan](model.operations, 2048) for plan in names]
    if len(chosen) > 1:  # as an engine takes them from the store
        nano = BUILT_IN["nano-batch"]
        chosen += [
            replace(nano(model.operations, n), loads=((d, 9),)) for n, d in ((2048, 682), (2048, 2048), (640, 640))
        ]
    with ExitStack() as undo:
        make(model, chosen, Sizes(2048, seqs, length, 16), undo, num_host_pages=2000)
        taken = sum(each.num_bytes for each in device_double.LIVE if isinstance(each, Counted))
    reckoned = workspace_bytes(model, chosen, max_num_seqs=seqs, max_model_len=length, page_size=16, sms=SMS)
    assert taken <= reckoned - RESERVED_BYTES <= 1.2 * taken
