"""The public API on the GPU against the same on the CPU, with the bundled model.

The GPU computes in bfloat16, so where two tokens are almost equally likely it may choose the other, and everything
after differs. Whether a text is right is therefore asked of the CPU token by token, each after the GPU's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import write_model

from nf import LLM, AsyncLLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.gpu

MARGIN = 0.15  # nats by which a token may be less likely than the best and still be taken for rounding
SUBJECTS = (
    "path", "line", "name", "value", "key", "items", "text", "file", "index", "number", "stream", "node", "module",
    "result", "message", "socket", "thread", "parser", "buffer", "object", "string", "address", "pattern", "count",
    "header",
)  # fmt: skip
PROMPTS = [f"def read_{subject}(self, {subject}):" for subject in SUBJECTS]
PROMPTS += [f"Return the {subject} of" for subject in SUBJECTS]
GREEDY = SamplingParams(temperature=0, max_tokens=48)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40, seed=3)


@pytest.fixture(scope="module")
def gpu() -> Iterator[LLM]:
    with LLM("nf-tiny", device="cuda") as llm:
        yield llm


@pytest.fixture(scope="module")
def cpu() -> Iterator[LLM]:
    with LLM("nf-tiny", device="cpu", dtype="bfloat16") as llm:
        yield llm


def generate(llm: LLM, prompts: Any, params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def check_greedy(cpu: LLM, outputs: list[RequestOutput]) -> None:
    """Each token is the likeliest after those before it, or less likely by no more than rounding."""
    texts = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
    for output, judged in zip(
        outputs, generate(cpu, texts, GREEDY.with_(max_tokens=1, prompt_logprobs=1)), strict=True
    ):
        assert judged.prompt_logprobs is not None
        for position in range(len(output.prompt_token_ids), len(judged.prompt_token_ids)):
            at = judged.prompt_logprobs[position]
            assert at is not None
            best = max(found.logprob for found in at.values())
            assert best - at[judged.prompt_token_ids[position]].logprob <= MARGIN


def test_greedy_text_is_the_cpus_where_the_margin_allows_it(gpu: LLM, cpu: LLM) -> None:
    found, expected = generate(gpu, PROMPTS, GREEDY), generate(cpu, PROMPTS, GREEDY.with_(logprobs=2))
    same = 0
    for ours, theirs in zip(found, expected, strict=True):
        completion = theirs.outputs[0]
        pairs = list(zip(ours.outputs[0].token_ids, completion.token_ids, strict=False))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is None:
            assert ours.outputs[0].text == completion.text
            assert ours.outputs[0].finish_reason == completion.finish_reason
            same += 1
        else:
            assert completion.logprobs is not None
            best, second = sorted((at.logprob for at in completion.logprobs[first].values()), reverse=True)[:2]
            assert best - second <= MARGIN
    assert same >= 30  # two of three prompts meet a margin below 0.04 somewhere in their 48 tokens
    check_greedy(cpu, found)


@pytest.mark.parametrize("plan", ["sequential", "nano-batch"])
def test_small_steps_and_every_plan(cpu: LLM, plan: str) -> None:
    """Prompts in many chunks beside decodes, so that rows move between nano-batches all the time."""
    prompts = [" ".join(PROMPTS[start : start + 5]) for start in range(0, 50, 2)]
    with LLM("nf-tiny", device="cuda", plan=plan, max_num_batched_tokens=96, max_num_seqs=20) as llm:
        outputs = generate(llm, prompts, GREEDY)
    check_greedy(cpu, outputs)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_preemption_changes_nothing(cpu: LLM, monkeypatch: pytest.MonkeyPatch, preemption: str) -> None:
    monkeypatch.setattr("nf.scheduler.memory.PRIOR_OUTPUT_LEN", 4.0)  # so all are admitted, and memory runs out later
    options: dict[str, Any] = {"num_pages": 64, "num_host_pages": 64, "max_num_batched_tokens": 256}
    with LLM("nf-tiny", device="cuda", preemption=preemption, **options) as llm:
        outputs = generate(llm, PROMPTS[:30], GREEDY.with_(max_tokens=120, ignore_eos=True))
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert {len(tokens) for tokens in token_ids(outputs)} == {120}
    check_greedy(cpu, outputs)


def test_logprobs_are_near_the_cpus(gpu: LLM, cpu: LLM) -> None:
    params = GREEDY.with_(max_tokens=1, logprobs=5, prompt_logprobs=5)
    text = " ".join(PROMPTS[:8])
    (ours,), (theirs,) = generate(gpu, [text], params), generate(cpu, [text], params)
    assert ours.prompt_logprobs is not None
    assert theirs.prompt_logprobs is not None
    assert ours.prompt_logprobs[0] is None
    pairs = list(zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True))
    pairs += zip(ours.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True)
    for position, (a, b) in enumerate(pairs):
        assert a is not None
        assert b is not None
        assert 5 <= len(a) <= 6
        common = a.keys() & b.keys()
        assert len(common) >= 3
        for token in common:
            assert abs(a[token].logprob - b[token].logprob) <= MARGIN + 0.02 * abs(b[token].logprob), position
    best = [min(at.values(), key=lambda found: found.rank).logprob for at, _ in pairs if at is not None]
    assert all(
        found == max(each.logprob for each in at.values()) for found, (at, _) in zip(best, pairs, strict=True) if at
    )


def test_seeds_make_texts_reproducible(gpu: LLM) -> None:
    first, again = (token_ids(generate(gpu, PROMPTS, SAMPLED)) for _ in range(2))
    assert first == again
    other = token_ids(generate(gpu, PROMPTS, SAMPLED.with_(seed=4)))
    assert sum(a != b for a, b in zip(first, other, strict=True)) >= 45


def test_several_continuations_of_one_prompt(gpu: LLM, cpu: LLM) -> None:
    (found,) = generate(gpu, [PROMPTS[0]], SAMPLED.with_(n=6, logprobs=0))
    texts = [tuple(completion.token_ids) for completion in found.outputs]
    assert len(set(texts)) >= 5
    (expected,) = generate(cpu, [PROMPTS[0]], SAMPLED.with_(n=6))
    first = [completion.token_ids[0] for completion in expected.outputs]
    assert sum(a[0] == b for a, b in zip(texts, first, strict=True)) >= 5  # the same noise, hardly different logits


def test_sampling_parameters_reach_the_gpu(gpu: LLM) -> None:
    def one(**params: Any) -> RequestOutput:
        return generate(gpu, [PROMPTS[1]], SamplingParams(**({"seed": 1, "temperature": 1.0} | params)))[0]

    free = one(max_tokens=60, ignore_eos=True).outputs[0]
    allowed = one(allowed_token_ids=[265, 266, 267], max_tokens=30).outputs[0]
    assert set(allowed.token_ids) <= {265, 266, 267}
    assert len(allowed.token_ids) == 30
    stop = free.token_ids[9]
    stopped = one(max_tokens=60, stop_token_ids=[stop], ignore_eos=True).outputs[0]
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    biased = one(logit_bias={300: 100.0}, max_tokens=8, ignore_eos=True).outputs[0]
    assert biased.token_ids == [300] * 8
    penalized = one(logit_bias={300: 100.0}, max_tokens=8, ignore_eos=True, repetition_penalty=2.0).outputs[0]
    assert penalized.token_ids[0] == 300
    late = one(logit_bias={stop: 100.0}, stop_token_ids=[stop], min_tokens=4, max_tokens=30).outputs[0]
    assert (len(late.token_ids), late.finish_reason, late.stop_reason) == (5, "stop", stop)
    for penalty in ("presence_penalty", "frequency_penalty"):
        unlike = one(temperature=0, max_tokens=40, ignore_eos=True, **{penalty: 2.0}).outputs[0]
        alike = one(temperature=0, max_tokens=40, ignore_eos=True, **{penalty: -2.0}).outputs[0]
        assert len(set(unlike.token_ids)) > len(set(alike.token_ids))
    without = one(temperature=0, max_tokens=40).outputs[0]
    word = without.text.split()[1]
    assert word not in one(temperature=0, max_tokens=40, bad_words=[word]).outputs[0].text.split()
    greedy = [
        one(max_tokens=20, **limit).outputs[0].token_ids for limit in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})
    ]
    assert greedy == [one(temperature=0, max_tokens=20).outputs[0].token_ids] * 3


@pytest.mark.parametrize("num_pages", [None, 64])
def test_an_abort_frees_everything_and_harms_nobody(
    cpu: LLM, monkeypatch: pytest.MonkeyPatch, num_pages: int | None
) -> None:
    """Also while the pages of some are on the host, or on their way there."""
    monkeypatch.setattr("nf.scheduler.memory.PRIOR_OUTPUT_LEN", 4.0)  # so all are admitted, and memory runs out later
    options: dict[str, Any] = {"num_pages": num_pages, "num_host_pages": 64, "preemption": "swap"}

    async def main() -> list[RequestOutput]:
        async with AsyncLLM("nf-tiny", device="cuda", max_num_batched_tokens=128, **options) as llm:
            scheduler = llm.loaded.scheduler
            free = scheduler.num_free_pages, scheduler.num_free_host_pages

            async def collect(index: int) -> RequestOutput:
                last, seen = None, 0
                params = GREEDY.with_(max_tokens=200, ignore_eos=True)
                async for output in llm.generate(PROMPTS[index], params, request_id=f"r{index}"):
                    last, seen = output, seen + 1
                    if index % 2 and seen == 5 + index:
                        await llm.abort(f"r{index}")
                assert last is not None
                return last

            outputs = await asyncio.gather(*map(collect, range(16)))
            while scheduler.has_work:
                await asyncio.sleep(0.01)
            assert (scheduler.num_free_pages, scheduler.num_free_host_pages) == free
            return outputs

    outputs = asyncio.run(main())
    assert (sum(output.metrics.preemptions for output in outputs) > 0) == (num_pages is not None)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "abort"] * 8
    check_greedy(cpu, outputs)


def test_a_nan_in_one_prompts_embedding_harms_nobody_else(tmp_path: Path) -> None:
    sizes = {"vocab_size": 272, "hidden_size": 128, "intermediate_size": 192, "head_dim": 64}
    sound = write_model(tmp_path / "sound", tokenizer=False, **sizes)
    broken = write_model(tmp_path / "broken", tokenizer=False, **sizes)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][33] = np.nan
    save_file(tensors, broken / "model.safetensors")
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(34, 272, length)] for length in (30, 5, 60, 41)]
    params = GREEDY.with_(max_tokens=12, ignore_eos=True, logit_bias={33: -100.0})
    options: dict[str, Any] = {"device": "cuda", "skip_tokenizer_init": True, "max_num_batched_tokens": 64}
    with LLM(str(broken), **options) as llm:
        outputs = generate(llm, [*prompts, [40, 33, 41]], params)
        again = generate(llm, prompts, params)  # on the pages that held it
    with LLM(str(sound), **options) as llm:
        expected = generate(llm, prompts, params)
    assert outputs[4].outputs[0].finish_reason == "error"
    assert outputs[4].outputs[0].token_ids == []
    assert outputs[4].error is not None
    assert outputs[4].error.startswith("output token 1 of continuation 0 cannot be sampled: the model's logits")
    assert [output.outputs[0].finish_reason for output in [*outputs[:4], *again]] == ["length"] * 8
    equal = sum(a == b for a, b in zip(token_ids(outputs[:4] + again), 2 * token_ids(expected), strict=True))
    assert equal >= 6  # the others by rounding: batches were not the same
