"""scripts/bench_vllm.py against a stand-in for vLLM, and scripts/random_checkpoint.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from nf.bench.workload import constant
from nf.cli import main as nf
from nf.hub import resolve_model
from nf.llm import LLM
from nf.models.hf_config import read_config
from nf.models.shapes import SHAPES
from nf.sampling_params import SamplingParams

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORK = ["--num-prompts", "3", "--input-len", "7", "--output-len", "4", "--seed", "5"]


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


class FakeVllm(ModuleType):
    """vLLM's LLM and SamplingParams, answering with as many tokens as asked for, plus ``surplus``."""

    __version__ = "0.0"

    def __init__(self, surplus: int = 0) -> None:
        super().__init__("vllm")
        self.options: dict[str, Any] = {}
        self.calls: list[tuple[list[Any], list[SimpleNamespace]]] = []
        self.surplus = surplus
        self.SamplingParams = SimpleNamespace

    def LLM(self, **options: Any) -> FakeVllm:  # noqa: N802
        self.options = options
        return self

    def generate(self, prompts: list[Any], params: list[SimpleNamespace], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.calls.append((prompts, params))
        lens = [one.max_tokens + self.surplus for one in params]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * length)]) for length in lens]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    return load_script("bench_vllm", monkeypatch)


MODEL = str(resolve_model("nf-tiny"))


def test_vllm_gets_the_same_requests_and_is_compared(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "nf.json", tmp_path / "vllm.json"
    assert nf(["bench", "throughput", *WORK, "--device", "cpu", "--quiet", "--json", str(ours)]) == 0
    vllm = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    options = ["--max-num-seqs", "9", "--engine-arg", "enforce_eager=true", "--json", str(theirs)]
    assert script.main([MODEL, *WORK, *options, "--nf-json", str(ours)]) == 0

    assert vllm.options["model"] == MODEL
    assert (vllm.options["max_num_seqs"], vllm.options["enforce_eager"]) == (9, True)
    assert vllm.options["enable_prefix_caching"] is False
    _, (prompts, params) = vllm.calls  # the first was the warm-up
    assert [prompt["prompt_token_ids"] for prompt in prompts] == constant(7, 4, 3, seed=5).prompts(4096)
    assert all((p.temperature, p.max_tokens, p.ignore_eos) == (0.0, 4, True) for p in params)

    record, rate = json.loads(theirs.read_text()), json.loads(ours.read_text())["results"]["tokens_per_second"]["total"]
    assert record["ratio"] == pytest.approx(rate / record["results"]["tokens_per_second"]["total"])
    assert record["results"]["tokens_per_second"]["total"] == pytest.approx(33 / record["results"]["seconds"])
    assert capsys.readouterr().out.splitlines()[-1] == f"nf / vLLM {record['ratio']:.3f}"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("no JSON", "is not a record of nf bench throughput"),
        ("{}", "is not a record of nf bench throughput"),
        (
            json.dumps({"workload": {"requests": 4}, "results": {"tokens_per_second": {"total": 1.0}}}),
            "is of other requests: requests 4, here 3",
        ),
    ],
)
def test_a_record_of_other_work_is_refused(
    record: str, said: str, script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nf.json"
    file.write_text(record)
    assert script.main([MODEL, *WORK, "--nf-json", str(file)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_without_vllm(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert script.main([MODEL, *WORK]) == 1
    assert capsys.readouterr().err == "bench_vllm: vLLM is not installed here (pip install vllm)\n"


def test_outputs_of_other_lengths_are_no_measurement(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", FakeVllm(surplus=1))
    with pytest.raises(SystemExit, match="do not have the lengths"):
        script.main([MODEL, *WORK])


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_is_read_back_as_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("random_checkpoint", monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps(script.hf_config(SHAPES[name])))
    assert read_config(tmp_path) == replace(SHAPES[name], dtype="bfloat16")


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "qwen2-7b", "qwen3-8b"])
def test_a_random_checkpoint_can_be_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("random_checkpoint", monkeypatch)
    config = replace(
        SHAPES[name], vocab_size=300, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, max_position_embeddings=64, bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip
    size = script.write_checkpoint(config, tmp_path)
    assert size == sum(value.nbytes for file in tmp_path.glob("*.safetensors") for value in load_file(file).values())
    with LLM(tmp_path, skip_tokenizer_init=True, device="cpu") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([[3, 4, 5]], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5
    layer = load_file(tmp_path / "model-00002-of-00003.safetensors")
    assert all((value == 1).all() for tensor, value in layer.items() if "norm" in tensor)
    matrices = [value.astype(np.float32) for tensor, value in layer.items() if value.ndim == 2]
    assert all(value.dtype == ml_dtypes.bfloat16 for value in layer.values())
    assert all(matrix.std() == pytest.approx(0.02, rel=0.05) for matrix in matrices)
    assert len({matrix.ravel()[:8].tobytes() for matrix in matrices}) == len(matrices)
