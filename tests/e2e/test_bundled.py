"""The bundled model as users meet it: small, writing as its text does, ending by EOS, the same for the same seed."""

from __future__ import annotations

import ast
import json
import math
import random
from collections.abc import Iterator

import pytest

from nf import LLM, RequestOutput, SamplingParams
from nf.hub import BUNDLED_DIR
from nf.models.hf_config import read_config, read_sampling_defaults

MAX_BYTES = 12_000_000

# Both texts are Copyright © Python Software Foundation (LICENSE-PSF.txt in the model's directory).
LEARNED = (
    "<|user|>What does os.path.join do?<|assistant|>Join one or more path segments intelligently. The return value is "
    "the concatenation of path and all members of *paths, with exactly one directory separator following each "
    "non-empty part, except the last. That is, the result will only end in a separator if the last part is either "
    "empty or ends in a separator."
)
HELD_OUT = '''def seek(self, pos, whence=0):
    """Seek to specified position into the chunk.
    Default position is 0 (start of chunk).
    If the file is not seekable, this will result in an error.
    """

    if self.closed:
        raise ValueError("I/O operation on closed file")
    if not self.seekable:
        raise OSError("cannot seek")
'''  # from the module chunk, one of those that training never saw

CODE_PROMPTS = ("def read_lines(path):", "def add(a, b):", "def __eq__(self, other):", "def __init__(self, name):")
PROSE_PROMPTS = ("Return True if", "This module provides", "The following functions are")
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=300)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=7, max_tokens=64)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("nf-tiny", device="cpu") as llm:
        yield llm


def generate(llm: LLM, prompts: list[str], params: SamplingParams) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def mean_logprob(llm: LLM, prompt: str | list[int]) -> float:
    """Nats per token, over the prompt's tokens after the first."""
    prompts = [prompt]
    (output,) = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    assert output.prompt_logprobs is not None
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    chosen = [position[token].logprob for token, position in pairs if position is not None]
    return math.fsum(chosen) / len(chosen)


def shuffled(llm: LLM, text: str) -> list[int]:
    (output,) = generate(llm, [text], SamplingParams(max_tokens=1))
    first, *rest = output.prompt_token_ids
    random.Random(0).shuffle(rest)
    return [first, *rest]


def test_the_directory_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in BUNDLED_DIR.iterdir()}
    assert sum(files.values()) <= MAX_BYTES
    assert {"README.md", "LICENSE-PSF.txt", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files)


def test_config_suits_the_kernels_and_the_tokenizer() -> None:
    config = read_config(BUNDLED_DIR)
    assert config.head_dim in (64, 128)
    assert config.hidden_size % 64 == config.intermediate_size % 64 == 0
    vocabulary = json.loads((BUNDLED_DIR / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert config.vocab_size == len(vocabulary)
    assert config.eos_token_ids == (vocabulary["<|eos|>"],)
    SamplingParams(**read_sampling_defaults(BUNDLED_DIR))


def test_text_known_by_heart_is_likely_and_only_in_its_order(llm: LLM) -> None:
    """Uniform logits give -8.3 nats per token, the right ones -0.23 and RoPE with twice its theta -0.28 already."""
    assert mean_logprob(llm, LEARNED) > -0.25
    assert mean_logprob(llm, shuffled(llm, LEARNED)) < -6.0


def test_text_never_seen_is_likely_too(llm: LLM) -> None:
    """An RMS norm with epsilon 0.01 in place of 1e-5, or heads of another size, gives less than -4."""
    assert mean_logprob(llm, HELD_OUT) > -1.2
    assert mean_logprob(llm, shuffled(llm, HELD_OUT)) < -6.0


def test_code_parses_and_ends_by_itself(llm: LLM) -> None:
    for prompt, output in zip(CODE_PROMPTS, generate(llm, list(CODE_PROMPTS), GREEDY), strict=True):
        completion = output.outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        (function,) = ast.parse(prompt + completion.text).body
        assert isinstance(function, ast.FunctionDef)


def test_prose_ends_by_itself_with_a_sentence(llm: LLM) -> None:
    for output in generate(llm, list(PROSE_PROMPTS), GREEDY):
        completion = output.outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert completion.text.startswith(" ")
        assert completion.text.endswith(".")


def test_chat_answers_from_the_documentation(llm: LLM) -> None:
    expected = {
        "What does os.path.join do?": LEARNED.rpartition("<|assistant|>")[2],
        "What does len do?": "Return the length (the number of items) of an object.",
        "When is KeyError raised?": "Raised when a mapping (dictionary) key is not found in the set of existing keys.",
    }
    conversations = [[{"role": "user", "content": question}] for question in expected]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=300), use_tqdm=False)
    for output, beginning in zip(outputs, expected.values(), strict=True):
        assert output.outputs[0].text.startswith(beginning)
        assert output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
def test_the_same_text_every_time_and_in_any_company(llm: LLM, params: SamplingParams) -> None:
    together = generate(llm, [*CODE_PROMPTS, *PROSE_PROMPTS], params)
    assert texts(generate(llm, [*CODE_PROMPTS, *PROSE_PROMPTS], params)) == texts(together)
    assert texts(generate(llm, [CODE_PROMPTS[0]], params)) == texts(together)[:1]


def test_another_seed_gives_another_text(llm: LLM) -> None:
    outputs = llm.generate([CODE_PROMPTS[0]] * 2, [SAMPLED, SAMPLED.with_(seed=8)], use_tqdm=False)
    first, second = texts(outputs)
    assert first != second
