"""Loading on a machine with a GPU: "auto" takes it, memory is used as configured and given back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nf.errors import InputError
from nf.executors.gpu import GpuExecutor
from nf.kernels.device import Device, DeviceMemory
from nf.llm import LLM
from nf.loading import load
from nf.sampling_params import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

TINY: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_batched_tokens": 64}


@pytest.fixture(autouse=True)
def device() -> Iterator[Device]:
    """No test leaves memory behind."""
    load("nf-tiny", **TINY).executor.close()  # what the driver keeps from its first use
    device = Device()
    free = device.memory()[0]
    yield device
    assert device.memory()[0] >= free - (32 << 20)


def test_auto_takes_the_gpu() -> None:
    with LLM("nf-tiny", **TINY) as llm:
        outputs = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
        assert len(outputs[0].outputs[0].token_ids) == 9
    loaded = load("nf-tiny", **TINY)
    assert isinstance(loaded.executor, GpuExecutor)
    assert (loaded.config.device, loaded.config.dtype, loaded.config.max_num_seqs) == ("cuda", "bfloat16", 64)
    assert {"weights", "kernels", "capture"} <= loaded.startup.keys()
    assert "is there" in loaded.device_reason
    loaded.executor.close()


def test_pages_use_the_configured_share_of_the_memory(device: Device) -> None:
    """Of the whole GPU, what others hold included; the executor's estimate of itself errs on the safe side."""
    other = DeviceMemory(8 << 30, "others")
    free, total = device.memory()
    for share in (0.3, 0.6):
        loaded = load("llama-3-8b", random_weights=True, gpu_memory_utilization=share, max_num_batched_tokens=256)
        used = total - device.memory()[0]
        assert share * total - (3 << 30) <= used <= share * total + (64 << 20)
        loaded.executor.close()
    assert device.memory()[0] >= free - (32 << 20)
    other.free()


def test_too_little_memory_is_said_with_numbers(device: Device) -> None:
    other = DeviceMemory(device.memory()[0] - (4 << 30), "others")
    with pytest.raises(InputError, match=r"^gpu_memory_utilization: 0\.92 of .* MiB are free; a smaller model"):
        load("llama-3-8b", random_weights=True)
    other.free()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "^dtype: must be auto or bfloat16 on a GPU"),
        ({"page_size": 4}, "^page_size: must be one of 16, 32, 64 on a GPU"),
    ],
)
def test_options_that_only_the_cpu_takes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load("nf-tiny", **TINY, **options)
    load("nf-tiny", **TINY, **options, device="cpu").executor.close()
