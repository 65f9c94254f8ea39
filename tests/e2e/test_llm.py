"""LLM and AsyncLLM from a model directory to text, and every way in which a model or an option can be wrong."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from engine_doubles import EOS
from safetensors.numpy import load_file, save_file
from small_models import write_model

from nf import LLM, AsyncLLM, InputError, ModelError, PlanError, RequestOutput, SamplingParams
from nf.graphs.plan import nano_batch_plan
from nf.models.hf_config import read_config
from nf.models.registry import declare

PROMPTS = ["def read_lines(path):", "import os", "x", "The quick brown fox jumps over the lazy dog. " * 2]
GREEDY = SamplingParams(temperature=0, max_tokens=20)
SAMPLED = SamplingParams(temperature=1.2, max_tokens=20, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def run(model_dir: Path, params: SamplingParams = SAMPLED, **options: Any) -> list[list[int]]:
    with LLM(str(model_dir), **options) as llm:
        return token_ids(llm.generate(PROMPTS, params))


def test_a_batch_gives_what_each_prompt_gives_alone(model_dir: Path) -> None:
    with LLM(str(model_dir), max_num_batched_tokens=32) as llm:
        batch = llm.generate(PROMPTS, SAMPLED)
        alone = [llm.generate(prompt, SAMPLED)[0] for prompt in PROMPTS]
    assert token_ids(batch) == token_ids(alone)
    for prompt, output in zip(PROMPTS, batch, strict=True):
        assert output.prompt == prompt
        assert output.prompt_token_ids == list(prompt.encode())
        shown = bytes(token for token in output.outputs[0].token_ids if token < 256)
        assert output.outputs[0].text.replace("�", "") == shown.decode(errors="ignore")


def test_streaming_gives_the_same(model_dir: Path) -> None:
    async def main() -> list[list[RequestOutput]]:
        async with AsyncLLM(str(model_dir)) as llm:

            async def collect(prompt: str) -> list[RequestOutput]:
                return [output async for output in llm.generate(prompt, SAMPLED)]

            return await asyncio.gather(*map(collect, PROMPTS))

    streams = asyncio.run(main())
    assert [stream[-1].outputs[0].token_ids for stream in streams] == run(model_dir)
    for stream in streams:
        final = stream[-1].outputs[0].text
        assert stream[-1].finished
        assert all(final.startswith(output.outputs[0].text) for output in stream)


def test_not_streaming_gives_the_finished_output_alone(model_dir: Path) -> None:
    async def main() -> list[RequestOutput]:
        async with AsyncLLM(str(model_dir)) as llm:
            return [output async for output in llm.generate(PROMPTS[0], SAMPLED, stream=False)]

    outputs = asyncio.run(main())
    assert [output.finished for output in outputs] == [True]
    assert outputs[0].outputs[0].token_ids == run(model_dir)[0]


def test_plans_do_not_change_tokens(model_dir: Path, tmp_path: Path) -> None:
    expected = run(model_dir)
    assert run(model_dir, plan="nano-batch", max_num_batched_tokens=16, max_num_seqs=4) == expected
    plan = nano_batch_plan(declare(read_config(model_dir)).operations, 24)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert run(model_dir, plan=str(path)) == expected
    with pytest.raises(PlanError, match="made for 24 tokens, but 32 are asked for"):
        LLM(str(model_dir), plan=str(path), max_num_batched_tokens=32)


def test_engine_seed_makes_runs_reproducible(model_dir: Path) -> None:
    params = SamplingParams(n=3, max_tokens=8)
    assert run(model_dir, params, seed=5) == run(model_dir, params, seed=5)
    assert run(model_dir, params, seed=5) != run(model_dir, params, seed=6)


@pytest.mark.parametrize(("dtype", "rounded"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_dtype_rounds_the_weights(model_dir: Path, tmp_path: Path, dtype: str, rounded: Any) -> None:
    other = write_model(tmp_path / "rounded")
    tensors = {name: a.astype(rounded).astype(np.float32) for name, a in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors")
    params = GREEDY.with_(logprobs=1)
    with LLM(str(model_dir), dtype=dtype) as by_option, LLM(str(other)) as by_file, LLM(str(model_dir)) as full:
        found, expected, different = (llm.generate(PROMPTS, params) for llm in (by_option, by_file, full))
    assert [o.outputs[0].cumulative_logprob for o in found] == [o.outputs[0].cumulative_logprob for o in expected]
    assert [o.outputs[0].cumulative_logprob for o in found] != [o.outputs[0].cumulative_logprob for o in different]


def test_small_pools_preempt_and_change_nothing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.scheduler.memory.PRIOR_OUTPUT_LEN", 4.0)  # so all are admitted, and memory runs out later
    prompts = [f"prompt {index}" for index in range(8)]
    params = SAMPLED.with_(max_tokens=30)
    with LLM(str(model_dir)) as llm:
        expected = [(o.outputs[0].token_ids, o.outputs[0].text) for o in llm.generate(prompts, params)]
    for preemption in ("auto", "swap", "recompute"):
        with LLM(str(model_dir), num_pages=32, page_size=4, num_host_pages=32, preemption=preemption) as llm:
            outputs = llm.generate(prompts, params)
        assert [(o.outputs[0].token_ids, o.outputs[0].text) for o in outputs] == expected
        assert sum(output.metrics.preemptions for output in outputs) > 0


def test_one_prompt_that_never_fits_fails_alone(model_dir: Path) -> None:
    with LLM(str(model_dir), num_pages=16, page_size=4) as llm:
        outputs = llm.generate(PROMPTS, SAMPLED)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length", "length", "error"]
    assert outputs[3].error is not None
    assert "needs 28 KV pages of 4 tokens, but there are only 16" in outputs[3].error
    assert token_ids(outputs)[:3] == run(model_dir)[:3]


def test_a_nan_in_one_prompts_embedding_harms_nobody_else(model_dir: Path, tmp_path: Path) -> None:
    broken = write_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][ord("!")] = np.nan
    save_file(tensors, broken / "model.safetensors")
    params = SAMPLED.with_(logit_bias={ord("!"): -100.0})
    with LLM(str(broken), max_num_batched_tokens=32) as llm:
        outputs = llm.generate([*PROMPTS, "no!"], params)
        again = llm.generate(PROMPTS, params)  # on the pages that held it
    assert outputs[4].outputs[0].finish_reason == "error"
    assert outputs[4].outputs[0].token_ids == []
    assert outputs[4].error is not None
    assert outputs[4].error.startswith("output token 1 of continuation 0 cannot be sampled: the model's logits")
    assert token_ids(outputs)[:4] == token_ids(again) == run(model_dir, params)


def test_sampling_parameters_reach_the_executor(model_dir: Path) -> None:
    def one(**params: Any) -> RequestOutput:
        return llm.generate("abc", SamplingParams(seed=1, **params))[0]

    with LLM(str(model_dir)) as llm:
        free = one(max_tokens=60, ignore_eos=True)
        allowed = one(allowed_token_ids=[65, 66, 67], max_tokens=30).outputs[0]
        assert set(allowed.text) <= set("ABC")
        assert len(allowed.token_ids) == 30
        ended = one(logit_bias={EOS: 100.0}, min_tokens=4, max_tokens=30).outputs[0]
        assert (len(ended.token_ids), ended.finish_reason, ended.stop_reason) == (5, "stop", None)
        stop = free.outputs[0].token_ids[9]
        stopped = one(max_tokens=60, stop_token_ids=[stop], ignore_eos=True).outputs[0]
        assert stopped.token_ids == free.outputs[0].token_ids[: free.outputs[0].token_ids.index(stop) + 1]
        assert stopped.stop_reason == stop
        assert "AB" not in one(allowed_token_ids=[65, 66], bad_words=["AB"], max_tokens=50).outputs[0].text
        logprobs = one(max_tokens=3, logprobs=2, prompt_logprobs=1)
        assert [len(each) in (2, 3) for each in logprobs.outputs[0].logprobs or []] == [True] * 3
        assert [each is None for each in logprobs.prompt_logprobs or []] == [True, False, False]


def test_chat_and_other_templates_and_tokenizers(model_dir: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with LLM(str(model_dir)) as llm:
        (output,) = llm.chat(messages, GREEDY)
        assert output.prompt == "[user]Hi>"
    bare = write_model(tmp_path / "bare", tokenizer=False)
    with LLM(str(bare), tokenizer=str(model_dir), chat_template="{{ messages[0].content }}?") as llm:
        (output,) = llm.chat(messages, GREEDY)
        assert output.prompt == "Hi?"
    with LLM(str(bare), skip_tokenizer_init=True) as llm:
        assert llm.generate([1, 2], GREEDY)[0].outputs[0].text == ""
    (model_without := write_model(tmp_path / "plain") / "chat_template.jinja").unlink()
    with (
        LLM(str(model_without.parent)) as llm,
        pytest.raises(InputError, match="messages: the model has no chat template"),
    ):
        llm.chat(messages, GREEDY)


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    with LLM(str(path)) as llm:
        assert token_ids(llm.generate(PROMPTS)) == token_ids(llm.generate(PROMPTS, GREEDY.with_(max_tokens=16)))


def test_what_auto_comes_to(model_dir: Path) -> None:
    llm = AsyncLLM(str(model_dir), max_num_batched_tokens=64)
    config = llm.loaded.config
    asyncio.run(llm.close())
    assert (config.device, config.dtype, config.plan) == ("cpu", "float32", "sequential")
    assert config.max_model_len == 128
    assert config.max_num_seqs == 64  # each decoding sequence needs a row of the dense batch
    assert config.num_pages == 64 * 128 // 16


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_model_len": 129}, InputError, "max_model_len: 129 is more than 128, the model's max_position_embedd"),
        ({"max_num_seqs": 65, "max_num_batched_tokens": 64}, InputError, "max_num_seqs: 65 decoding sequences need"),
        ({"plan": "no-such-plan"}, PlanError, "no-such-plan: is neither a file nor a built-in plan"),
        ({"skip_tokenizer_init": True, "chat_template": "x"}, InputError, "chat_template: cannot be used together"),
        ({"tokenizer": "/no/such/dir"}, ModelError, "/no/such/dir: is neither a directory"),
        ({"tokenizer": 5}, InputError, "tokenizer: must be a directory, .*, not 5"),
        ({"skip_tokenizer_init": "yes"}, InputError, "skip_tokenizer_init: must be true or false, not 'yes'"),
        ({"max_num_batched_tokens": 1 << 21}, InputError, "max_num_batched_tokens: must be 1 to 1048576 tokens, got 2"),
        ({"page_size": 1 << 30}, InputError, "page_size: 1 KV pages of 1073741824 tokens .* need .* MiB, and"),
        ({"num_pages": 1 << 30}, InputError, "num_pages: 1073741824 KV pages .* need .* MiB, and .* MiB are free"),
    ],
)
def test_wrong_options_are_found_before_the_weights_are_read(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    def no_weights(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("nf.backends.load_weights", no_weights)
    with pytest.raises(kind, match=message):
        LLM(str(model_dir), **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"hidden_size": 40}, r"model.safetensors: .* has shape \[260, 32\], but config.json asks for \[260, 40\]"),
    ],
)
def test_models_that_cannot_be_used(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    path = write_model(tmp_path / "model")
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | config))
    with pytest.raises(InputError, match=message):
        LLM(str(path))


def test_missing_tokenizer_and_missing_model(tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare", tokenizer=False)
    with pytest.raises(ModelError, match=r"tokenizer\.json: is missing"):
        LLM(str(bare))
    with pytest.raises(ModelError, match="is neither a directory, a hub name"):
        LLM(str(tmp_path / "nothing here"))
    for wrong in (5, ""):
        with pytest.raises(InputError, match="model: must be a directory"):
            LLM(wrong)  # type: ignore[arg-type]


def test_paths_are_names_too(model_dir: Path, tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare", tokenizer=False)
    path = tmp_path / "plan.json"
    path.write_text(nano_batch_plan(declare(read_config(bare)).operations, 24).to_json())
    with LLM(bare, tokenizer=model_dir, plan=path) as llm:
        assert token_ids(llm.generate(PROMPTS, SAMPLED)) == run(model_dir)


def test_weights_beyond_memory_are_refused_with_both_numbers(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf.backends.free_ram", lambda: 1000)
    with pytest.raises(ModelError, match=r"its weights need .* MiB in float32, and .* MiB are free"):
        LLM(str(model_dir))


def test_a_windowed_model_runs_beyond_its_window(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", architectures=["MistralForCausalLM"], sliding_window=40)
    with LLM(str(path)) as llm:
        (output,) = llm.generate("a" * 60, SamplingParams(max_tokens=68, temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 68


@pytest.mark.parametrize("ending", ["", "del llm", "llm.close()", "raise SystemExit(0)"])
def test_a_script_may_end_without_close(model_dir: Path, ending: str) -> None:
    script = f"""
import nf
llm = nf.LLM({str(model_dir)!r})
print(len(llm.generate("a", nf.SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids))
llm.chat([dict(role="user", content="a")], use_tqdm=False)
{ending}
"""
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "4\n", "")
