"""Which device is chosen, on machines made up here, and the reason that is given."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nf.device_choice
from nf.config import ModelConfig
from nf.device_choice import choose_device, find_kernels, model_problem
from nf.errors import InputError
from nf.kernels import compile as kernel_compile
from nf.kernels.compile import PACKAGES, SCHEMA, CompileError, artifact_path
from nf.kernels.compiler_processes import CompilerProcesses
from nf.kernels.registry import all_sources
from nf.kernels.source import KernelSource
from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.models.shapes import SHAPES, shape

H200 = {"name": "NVIDIA H200", "compute_capability": "9.0", "sms": 132, "memory": 141 << 30, "driver_cuda": "13.0"}
FIXTURES = Path(__file__).parents[1] / "fixtures"


class Machine:
    """One with a GPU, compilers and the CUDA runtime; tests take some of it away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.gpu: dict[str, Any] | None = dict(H200)
        self.has_compilers = True
        self.has_runtime = True
        monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path))
        monkeypatch.delenv("NF_KERNEL_BUNDLE", raising=False)
        monkeypatch.setattr(nf.device_choice, "gpu_devices", self.gpus)
        monkeypatch.setattr(kernel_compile, "package_version", lambda _package: "1.0" if self.has_compilers else None)
        monkeypatch.setattr(nf.device_choice, "import_module", self.module)

    def gpus(self) -> tuple[list[dict[str, Any]], str | None]:
        return ([self.gpu], None) if self.gpu else ([], "the CUDA driver shows no device")

    def module(self, name: str) -> Any:
        assert name == "cuda.pathfinder"
        if not self.has_runtime:
            raise ImportError("No module named 'cuda.pathfinder'")
        return SimpleNamespace(load_nvidia_dynamic_lib=lambda _name: None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def refused(reason: str, config: ModelConfig | None = None) -> None:
    """ "auto" takes the CPU for this reason, and "cuda" gives it."""
    model = declare(config) if config else None
    choice = choose_device("auto", model)
    assert choice.name == "cpu"
    assert reason in choice.reason
    with pytest.raises(InputError) as raised:
        choose_device("cuda", model)
    assert str(raised.value) == f"device: 'cuda' cannot be had: {choice.reason}; use 'cpu' or 'auto'"


def test_a_gpu_that_is_not_used_is_said_so_unless_the_user_wanted_that(machine: Machine) -> None:
    assert not choose_device("auto").leaves_gpu
    assert not choose_device("cpu").leaves_gpu
    machine.has_runtime = False
    assert choose_device("auto").leaves_gpu
    assert not choose_device("cpu").leaves_gpu
    machine.gpu = None
    assert not choose_device("auto").leaves_gpu


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"llama-3.1-405b"}))  # 16 query heads per KV head
def test_auto_takes_the_gpu_for_every_named_shape(name: str) -> None:
    choice = choose_device("auto", declare(shape(name)))
    assert choice.name == "cuda"
    assert choice.reason.startswith("NVIDIA H200 is there")
    assert choose_device("cuda", declare(shape(name))) == choice


@pytest.mark.usefixtures("machine")
def test_the_cpu_is_taken_when_asked_for() -> None:
    assert choose_device("cpu", declare(shape("llama-3-8b"))).name == "cpu"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": None}, "no GPU: the CUDA driver shows no device"),
        ({"gpu": H200 | {"compute_capability": "8.0"}}, "NVIDIA H200 has compute capability 8.0, and the kernels are"),
        ({"gpu": H200 | {"driver_cuda": "12.8"}}, "the driver is for CUDA 12.8, and nf needs one for 13.0 or later"),
        ({"has_runtime": False}, "the CUDA runtime library cannot be loaded (No module named 'cuda.pathfinder'; pip"),
        ({"has_compilers": False}, "the kernels are not compiled and nvidia-cutlass-dsl-libs-base is not installed"),
    ],
)
def test_what_the_machine_lacks(machine: Machine, change: dict[str, Any], reason: str) -> None:
    for name, value in change.items():
        setattr(machine, name, value)
    refused(reason)


def test_kernels_come_from_a_bundle_the_cache_or_the_compilers(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_kernels().problem is None
    machine.has_compilers = False
    assert find_kernels().problem is not None
    fill(tmp_path / "kernels", all_sources())
    assert find_kernels().problem is None
    bundle = tmp_path / "bundle"
    monkeypatch.setenv("NF_KERNEL_BUNDLE", str(bundle))
    refused(f"NF_KERNEL_BUNDLE cannot be used ({bundle}: No such file or directory)")
    bundle.mkdir()
    refused(f"NF_KERNEL_BUNDLE cannot be used ({bundle}: holds kernels for no GPU, this GPU needs sm_90a)")
    with pytest.raises(CompileError, match="NF_KERNEL_BUNDLE cannot be used"):
        find_kernels().artifacts()
    fill(bundle, all_sources())
    assert str(bundle) in choose_device("auto").reason


@pytest.mark.parametrize("where", ["bundle", "kernels"])
def test_kernels_are_looked_at_once_for_the_choice_and_the_executor(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    sources = all_sources()
    fill(tmp_path / where, sources)
    machine.has_compilers = False
    if where == "bundle":
        monkeypatch.setenv("NF_KERNEL_BUNDLE", str(tmp_path / where))
    kernels = choose_device("cuda").kernels
    assert kernels is not None
    monkeypatch.setattr(kernel_compile, "_stored", None)
    assert [artifact.source for artifact in kernels.artifacts()] == sources
    assert {artifact.path.parent for artifact in kernels.artifacts()} == {tmp_path / where / "sm_90a"}


def test_only_what_the_cache_lacks_is_compiled(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert machine.has_compilers
    sources = all_sources()
    fill(tmp_path / "kernels", sources[1:], compiler="1.0")
    compiled: list[str] = []

    def compile_one(_self: CompilerProcesses, source: KernelSource, _arch: str) -> bytes:
        compiled.append(source.name)
        return b"compiled now"

    monkeypatch.setattr(CompilerProcesses, "compile", compile_one)
    assert [artifact.source for artifact in find_kernels().artifacts()] == sources
    assert compiled == [sources[0].name]


@pytest.mark.parametrize("has_compilers", [True, False])
def test_kernels_of_another_version_are_found_out_before_any_work(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_compilers: bool
) -> None:
    machine.has_compilers = has_compilers
    sources = all_sources()
    stale = [replace(sources[-1], config=(("OLD", 1),)), *sources[:-1]]
    fill(tmp_path / "kernels", stale)
    if has_compilers:
        assert find_kernels().problem is None  # that one is compiled anew
    else:
        refused("the kernels are not compiled and nvidia-cuda-nvrtc is not installed")
    fill(tmp_path / "bundle", stale)
    monkeypatch.setenv("NF_KERNEL_BUNDLE", str(tmp_path / "bundle"))
    refused(f"NF_KERNEL_BUNDLE cannot be used ({tmp_path}/bundle/sm_90a: no intact {sources[-1].name} of this version")


def test_a_missing_compiler_matters_for_its_own_kernels_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        kernel_compile, "package_version", lambda package: "1.0" if package in PACKAGES["cuda"] else None
    )
    assert machine.has_compilers
    assert find_kernels().problem is not None
    fill(tmp_path / "kernels", [source for source in all_sources() if source.language == "cute"])
    assert find_kernels().problem is None


def fill(folder: Path, sources: list[KernelSource], compiler: str | None = None) -> None:
    """What compiling would have left, but for the code."""
    home = folder / "sm_90a"
    home.mkdir(parents=True, exist_ok=True)
    for source in sources:
        binary = source.name.encode()
        record = {
            "schema": SCHEMA,
            "digest": source.digest("sm_90a"),
            "compiler": compiler,
            "sha256": hashlib.sha256(binary).hexdigest(),
            "resources": [],
        }
        path = artifact_path(home, source, source.digest("sm_90a"))
        path.write_bytes(binary)
        path.with_suffix(".json").write_text(json.dumps(record))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("llama-3-8b", {"head_dim": 96}, "this model: head_dim: must be one of (64, 128), not 96"),
        ("llama-3-8b", {"num_kv_heads": 2}, "this model: num_heads: must be 1 to 8 times num_kv_heads (2), not 32"),
        ("llama-3-8b", {"hidden_size": 32_768}, "this model: hidden_size: must be a multiple of 8 and at most 16384"),
        ("llama-3-8b", {"vocab_size": 32_001}, "this model: lm_head is 32001 × 4096, and a product needs multiples of"),
        ("llama-3-8b", {"o_bias": True, "qkv_bias": True}, "this model: its output projection has a bias"),
        ("llama-3-8b", {"intermediate_size": 40}, "this model: down_proj is 4096 × 40, and a product needs"),
        ("mixtral-8x7b", {"num_experts": 128}, "this model: num_experts: must be 1 to 64, not 128"),
        ("mixtral-8x7b", {"experts_per_token": 3}, "this model: experts_per_token: must be one of (1, 2, 4)"),
    ],
)
def test_models_without_kernels(name: str, change: dict[str, Any], reason: str) -> None:
    refused(reason, replace(shape(name), **change))


def test_the_bundled_model_has_kernels() -> None:
    from nf.hub import BUNDLED_DIR

    assert model_problem(declare(read_config(BUNDLED_DIR))) is None
    assert model_problem(declare(read_config(FIXTURES / "llama"))) is not None  # heads of 8 … 32 dimensions
