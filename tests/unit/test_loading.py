"""What a model's name and options come to: random weights, defaults of each device, the sizes that are resolved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_doubles import byte_tokenizer_spec
from small_models import write_model

import nf.backends
import nf.loading
from nf.backends import GpuBackend
from nf.cli.main import main
from nf.config import ModelConfig
from nf.device_choice import DeviceChoice
from nf.errors import InputError, ModelError
from nf.executors import gpu, gpu_weights
from nf.graphs import partition
from nf.graphs.plan import nano_batch_plan, sequential_plan
from nf.graphs.plan_store import save_plans
from nf.kernels.compile import CompileError
from nf.kernels.device import CudaError, DeviceMemoryError
from nf.llm import LLM
from nf.loading import Loaded, load
from nf.models import shapes
from nf.models.registry import declare
from nf.sampling_params import SamplingParams
from nf.weights import random_weights

SMALL = ModelConfig("Qwen2ForCausalLM", 512, 128, 192, 2, 4, 2, 64, 1e-6, 256, qkv_bias=True, eos_token_ids=(7,))


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape that is drawn in no time, among the well-known ones."""
    monkeypatch.setattr(shapes, "SHAPES", {**shapes.SHAPES, "small": SMALL})
    monkeypatch.setattr(nf.loading, "SHAPES", shapes.SHAPES)
    return "small"


def closing(loaded: Loaded) -> Loaded:
    loaded.executor.close()
    return loaded


def test_a_shape_alone_runs_with_random_weights(small_shape: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with LLM(small_shape, device="cpu", random_weights=True) as llm, pytest.raises(InputError, match="tokenizer"):
        llm.generate("text")
    found = []
    for seed in (0, 0, 1):
        with LLM(small_shape, device="cpu", random_weights=True, seed=seed) as llm:
            found.append(llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids)
    assert len(found[0]) == 5
    assert found[0] == found[1] != found[2]


def test_a_shape_takes_a_tokenizer_that_is_named(small_shape: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer_spec())
    loaded = closing(load(small_shape, device="cpu", random_weights=True, tokenizer=tmp_path))
    assert loaded.tokenizer is not None
    with pytest.raises(InputError, match=r"^chat_template: cannot be used together with a shape alone; name"):
        load(small_shape, device="cpu", random_weights=True, chat_template="x")


def test_a_directory_with_random_weights_is_not_read_for_them(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (path / "model.safetensors").unlink()
    assert closing(load(path, device="cpu", random_weights=True)).tokenizer is not None
    with pytest.raises(ModelError, match="holds neither"):
        load(path, device="cpu")


def test_a_directory_goes_before_a_shape_of_its_name(
    small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / small_shape)
    monkeypatch.chdir(tmp_path)
    assert closing(load(small_shape, device="cpu", random_weights=True)).model_config.vocab_size == 260


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "llama-3-9b",
            {"random_weights": True},
            "^llama-3-9b: with random weights a model is .* one of llama-3-8b",
        ),
        ("llama-3-8b", {}, "^llama-3-8b: is neither a directory, a hub name"),
        ("llama-3-8b", {"random_weights": "yes"}, "^random_weights: must be true or false, not 'yes'"),
        ("small", {"random_weights": True, "max_num_seqs": 2.5}, "^max_num_seqs: must be an integer"),
    ],
)
@pytest.mark.usefixtures("small_shape")
def test_what_cannot_be_loaded(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(model, device="cpu", **options)


def test_random_weights_have_their_moments() -> None:
    weights = random_weights(declare(SMALL), 3, np.dtype(np.float32))
    matrices = [weights.embed, weights.lm_head, *(layer["gate_up_proj"] for layer in weights.layers)]
    for matrix in matrices:
        assert abs(matrix.std() / 0.02 - 1) < 0.05
        assert abs(matrix.mean()) < 0.02 * 5 / matrix.size**0.5
    assert len({matrix.ravel()[0] for matrix in matrices}) == len(matrices)
    assert all((layer["attn_norm"] == 1).all() and (layer["qkv_bias"] == 0).all() for layer in weights.layers)
    assert (weights.final_norm == 1).all()


def test_what_is_told_of_the_start(small_shape: str) -> None:
    loaded = closing(load(small_shape, device="cpu", random_weights=True))
    assert set(loaded.startup) == {"text", "device", "weights", "executor"}
    assert all(seconds >= 0 for seconds in loaded.startup.values())
    assert loaded.device_reason == "it was asked for"


def test_no_more_sequences_than_rows(small_shape: str) -> None:
    loaded = closing(load(small_shape, device="cpu", random_weights=True))
    assert loaded.config.max_num_seqs == 256
    loaded = closing(load(small_shape, device="cpu", random_weights=True, max_num_batched_tokens=100))
    assert loaded.config.max_num_seqs == 100


class Gpu:
    """A GPU of 16 GiB as far as loading sees it: sizes and calls are real, memory and kernels are not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        device = SimpleNamespace(sms=132, name="NVIDIA H200", arch="sm_90a", memory=lambda: (15 << 30, 16 << 30))
        self.kernels = [object()]
        self.origin: Any = SimpleNamespace(artifacts=lambda: self.kernels)
        choice = DeviceChoice("cuda", "a GPU is there", kernels=self.origin)
        monkeypatch.setattr("nf.kernels.device.Device", lambda: device)
        monkeypatch.setattr(nf.loading, "choose_device", lambda *_: choice)
        monkeypatch.setattr(gpu, "GpuExecutor", self.executor)
        monkeypatch.setattr(gpu_weights, "load_device_weights", lambda _model, path: self.weights(path))
        monkeypatch.setattr(gpu_weights, "random_device_weights", lambda _model, seed: self.weights(seed))

    def weights(self, source: Any) -> Any:
        self.calls.append(source)
        return "weights"

    def executor(self, model: Any, weights: Any, plans: Any, *, device: Any, artifacts: Any, **sizes: Any) -> Any:
        assert (model.config.head_dim, plans[0].dense_batch_size, device.sms) == (64, 2048, 132)
        assert (weights, artifacts) == ("weights", self.kernels)
        return SimpleNamespace(startup={"executor": 0.5, "capture": 1.5}, plans=plans, **sizes)


@pytest.fixture
def the_gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_the_gpu_gets_its_own_defaults_and_sizes(the_gpu: Gpu, small_shape: str) -> None:
    loaded = load(small_shape, random_weights=True, seed=5)
    config = loaded.config
    assert (config.device, config.dtype, config.max_num_seqs, config.page_size) == ("cuda", "bfloat16", 2048, 16)
    assert config.num_pages == 2048 * 256 // 16  # 2 · 2 layers · 2 heads · 64 · 2 bytes · 16 tokens: all fit
    assert config.num_host_pages == 0
    executor: Any = loaded.executor
    assert (executor.num_pages, executor.max_num_seqs, executor.max_model_len) == (config.num_pages, 2048, 256)
    assert the_gpu.calls == [5]
    assert set(loaded.startup) == {"text", "device", "kernels", "weights", "executor", "capture"}
    assert loaded.device_reason == "a GPU is there"


def test_the_gpu_reads_the_directory(the_gpu: Gpu, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", head_dim=64)
    load(path)
    assert the_gpu.calls == [path]


def test_kernels_are_there_before_weights_are_read(the_gpu: Gpu, small_shape: str) -> None:
    def refuse() -> Any:
        raise CompileError("embed: error: expected a ';'")

    the_gpu.origin.artifacts = refuse
    with pytest.raises(CompileError, match=r"^embed: error"):
        load(small_shape, random_weights=True)
    assert the_gpu.calls == []


def test_partitions_that_the_gpu_cannot_give_are_refused_before_weights_are_read(
    the_gpu: Gpu, small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = nano_batch_plan(declare(SMALL).operations, 2048)
    plan = replace(plan, streams=tuple(replace(s, sms=sms) for s, sms in zip(plan.streams, (101, 31), strict=True)))
    (tmp_path / "plan.json").write_text(plan.to_json())

    def give(counts: tuple[int, ...], _device: int) -> Any:
        assert counts == (101, 31)
        raise InputError("sms", "this GPU cannot give a partition of 101 SMs; the nearest it can is 104")

    monkeypatch.setattr(partition, "partitions", give)
    with pytest.raises(InputError, match=r"^sms: .* the nearest it can is 104"):
        load(small_shape, random_weights=True, plan=str(tmp_path / "plan.json"))
    assert the_gpu.calls == []
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path))
    save_plans([replace(plan, loads=((682, 9),))], SMALL, "NVIDIA H200", {})  # found, not chosen: it is passed over
    monkeypatch.setattr(partition, "partitions", lambda counts, device: counts and give(counts, device))
    assert load(small_shape, random_weights=True).config.plan == "sequential"


@pytest.mark.parametrize("part", ["weights", "17 KV pages"])
def test_too_little_memory_while_loading_is_one_sentence_and_a_failure(
    the_gpu: Gpu, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"{part} need 14.96 GiB of GPU memory, and 3.01 of 16.00 GiB are free"

    def refuse(*_: Any, **__: Any) -> Any:
        raise DeviceMemoryError(said)

    where = (gpu_weights, "load_device_weights") if part == "weights" else (gpu, "GpuExecutor")
    monkeypatch.setattr(*where, refuse)
    assert main(["generate", "-p", "text"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"nf generate: {said}\n")
    assert len(the_gpu.calls) == (part != "weights")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "^dtype: must be auto or bfloat16 on a GPU, not float16; device='cpu' takes it"),
        ({"page_size": 8}, "^page_size: must be one of 16, 32, 64 on a GPU, not 8; device='cpu' takes any"),
        (
            {"gpu_memory_utilization": 0.05},
            "^gpu_memory_utilization: 0.05 of 16,384 MiB is not enough for 1,024",
        ),
        ({"num_pages": 1 << 20}, "^num_pages: 1048576 KV pages of 16 tokens need"),
    ],
)
def test_what_the_gpu_does_not_take(the_gpu: Gpu, small_shape: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(small_shape, random_weights=True, **options)
    assert the_gpu.calls == []


def test_the_backends_unit_of_preemption_is_time(the_gpu: Gpu, small_shape: str) -> None:
    assert the_gpu.calls == []
    config = load(small_shape, random_weights=True).config
    swap, recompute = GpuBackend(the_gpu.origin).preemption_costs(config, declare(SMALL))
    assert 0 < swap < 1e-3
    assert 0 < recompute < 1e-3


def test_the_fastest_known_plans_are_taken_unless_another_is_named(
    the_gpu: Gpu, small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path))
    operations = declare(SMALL).operations
    stored = {}
    for size, number in ((2048, 682), (2048, 2048), (640, 640), (4096, 1365)):
        stored[size, number] = replace(nano_batch_plan(operations, size), loads=((number, 9),), name=f"{size}-{number}")
    for size in (2048, 640, 4096):
        save_plans([plan for (tokens, _), plan in stored.items() if tokens == size], SMALL, "NVIDIA H200", {})
    sequential = sequential_plan(operations, 2048)
    for options in ({}, {"plan": "auto"}):
        loaded: Any = load(small_shape, random_weights=True, **options)  # type: ignore[arg-type]
        first, *others = loaded.executor.plans
        assert first == sequential  # of steps of every size
        assert sorted(plan.name for plan in others) == ["2048-2048", "2048-682", "640-640"]
        assert {*others} == {plan for plan in stored.values() if plan.dense_batch_size <= 2048}
        assert sorted(loaded.config.plan.split("; ")) == ["2048-2048", "2048-682", "640-640", "sequential"]
    loaded = load(small_shape, random_weights=True, plan="sequential")
    assert (loaded.config.plan, loaded.executor.plans) == ("sequential", [sequential])
    assert the_gpu.calls == [0, 0, 0]


def test_plans_of_the_same_name_are_named_once(
    the_gpu: Gpu, small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path))
    operations = declare(SMALL).operations
    makes = (sequential_plan, 300), (nano_batch_plan, 682), (nano_batch_plan, 1400)
    plans = [replace(make(operations, 2048), loads=((number, 9),)) for make, number in makes]
    save_plans(plans, SMALL, "NVIDIA H200", {})
    loaded: Any = load(small_shape, random_weights=True)
    assert loaded.config.plan == "sequential; nano-batch"
    assert len(loaded.executor.plans) == 4
    assert the_gpu.calls == [0]


def test_stored_plans_with_partitions_are_passed_over_where_the_driver_has_none(
    the_gpu: Gpu, small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They were measured with them; sharing all SMs they might be slower than the sequential plan."""
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path))

    def refuse(counts: tuple[int, ...], _device: int) -> tuple[()]:
        if counts:
            raise CudaError("green contexts: CUDA_ERROR_NOT_SUPPORTED")
        return ()

    monkeypatch.setattr(partition, "partitions", refuse)
    shared = nano_batch_plan(declare(SMALL).operations, 2048)
    split = replace(shared, streams=tuple(replace(stream, sms=64) for stream in shared.streams), name="split")
    plans = [replace(split, loads=((700, 9),)), replace(shared, loads=((1400, 9),))]
    save_plans(plans, SMALL, "NVIDIA H200", {})
    loaded: Any = load(small_shape, random_weights=True)
    assert loaded.config.plan == "sequential; nano-batch"
    assert "is passed over: SM partitions are not available" in caplog.text
    assert the_gpu.calls == [0]
