"""Bad input: it is refused in one sentence, and nobody else notices. test_faults.py says which case is shown where."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from neighbours import VOCAB_SIZE, beside_neighbours, last, refused

from nf import LLM, AsyncLLM, InputError, SamplingParams


def test_empty_input(model_dir: Path) -> None:
    """Empty prompt, empty list, empty messages: an error."""

    async def fault(llm: AsyncLLM) -> None:
        await refused(llm, "", "prompt: is empty; give at least one character")
        await refused(llm, [], "prompt: is empty; give at least one token")
        await refused(llm, {"prompt_token_ids": []}, "prompt.prompt_token_ids: is empty; give at least one token")
        await refused(llm, {}, "prompt: must hold prompt_token_ids or prompt, and holds []")
        with pytest.raises(InputError, match=r"^messages: must be a list of at least one mapping with role and con"):
            await anext(llm.chat([]))

    beside_neighbours(model_dir, fault)
    with LLM(model_dir) as llm, pytest.raises(InputError, match=r"^prompts: is empty; give at least one prompt$"):
        llm.generate([])


def test_token_id_out_of_the_vocabulary(model_dir: Path) -> None:
    """A token id below 0 or not below the vocabulary size: an error before execution."""

    async def fault(llm: AsyncLLM) -> None:
        for token_id in (-1, VOCAB_SIZE, 2**31, 10**30):
            await refused(llm, [5, token_id], f"prompt[1]: token id {token_id} is not in [0, {VOCAB_SIZE})")
        await refused(llm, [5, 5.0], "prompt[1]: must be a token id, not 5.0")
        await refused(llm, b"ab", "prompt: must be a text, a list of token ids or a mapping, not bytes")

    beside_neighbours(model_dir, fault)


def test_longer_than_the_model(model_dir: Path) -> None:
    """prompt + max_tokens > max_model_len: an error with both numbers, never silent truncation."""

    async def fault(llm: AsyncLLM) -> None:
        sentence = "prompt: 500 prompt tokens + max_tokens 13 = 513, more than the model length 512"
        await refused(llm, "a" * 500, sentence, {"max_tokens": 13})
        sentence = "prompt: 512 tokens leave no room for output in the model length 512"
        await refused(llm, [7] * 512, sentence, {"max_tokens": None})
        sentence = "min_tokens: 13 exceeds the 12 tokens left"
        await refused(llm, "a" * 500, sentence, {"max_tokens": None, "min_tokens": 13})
        output = await last(llm, "a" * 500, SamplingParams(max_tokens=12, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 12

    beside_neighbours(model_dir, fault)


def test_beyond_a_cap(model_dir: Path) -> None:
    """n, best_of, logprobs, stop lists, logit_bias beyond a stated cap: an error before fan-out."""
    many = list(range(1025))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n": 129}, "n: must be between 1 and 128, not 129"),
        ({"n": 17}, "n: must be at most max_num_seqs = 16, not 17"),
        ({"best_of": 2}, "best_of: is not a sampling parameter"),
        ({"logprobs": 21}, "logprobs: must be between 0 and 20, not 21"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: must be between 0 and 20, not 21"),
        ({"stop": ["a"] * 17}, "stop: takes at most 16 strings, not 17"),
        ({"stop": "a" * 1025}, "stop: takes strings of at most 1024 characters, not 1025"),
        ({"bad_words": ["a"] * 129}, "bad_words: takes at most 128 strings, not 129"),
        ({"stop_token_ids": many}, "stop_token_ids: takes at most 1024 token ids, not 1025"),
        ({"allowed_token_ids": many}, "allowed_token_ids: takes at most 1024 token ids, not 1025"),
        ({"logit_bias": dict.fromkeys(many, 1.0)}, "logit_bias: takes at most 1024 token ids, not 1025"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias: token id 260 is not in [0, 260)"),
    ]

    async def fault(llm: AsyncLLM) -> None:
        for params, sentence in cases:
            await refused(llm, "a", sentence, params)

    beside_neighbours(model_dir, fault)


def test_number_out_of_range(model_dir: Path) -> None:
    """NaN, infinite or negative temperature, top_p 0, top_k −5, an unknown parameter: an error."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": float("nan")}, "temperature: must be in [0, 2], not nan"),
        ({"temperature": float("inf")}, "temperature: must be in [0, 2], not inf"),
        ({"temperature": -0.1}, "temperature: must be in [0, 2], not -0.1"),
        ({"temperature": 10**400}, f"temperature: must be in [0, 2], not {10**58}…"),
        ({"temperature": "1"}, "temperature: must be a number, not '1'"),
        ({"top_p": 0}, "top_p: must be in (0, 1], not 0"),
        ({"top_k": -5}, "top_k: must be between -1 and 2147483647, not -5"),
        ({"top_k": 2**31}, "top_k: must be between -1 and 2147483647, not 2147483648"),
        ({"top_k": True}, "top_k: must be an integer, not True"),
        ({"min_p": 1.5}, "min_p: must be in [0, 1], not 1.5"),
        ({"presence_penalty": 3}, "presence_penalty: must be in [-2, 2], not 3"),
        ({"repetition_penalty": 0}, "repetition_penalty: must be in (0, 2], not 0"),
        ({"seed": 2**64}, "seed: must be between 0 and 18446744073709551615, not 18446744073709551616"),
        ({"max_tokens": 0}, "max_tokens: must be between 1 and 2147483647, not 0"),
        ({"max_tokens": 10**5000}, "max_tokens: must be between 1 and 2147483647, not <int that cannot be shown>"),
        ({"logit_bias": {65: 10**400}}, f"logit_bias: must be in [-100, 100], not {10**58}…"),
        ({"logit_bias": {"9" * 5000: 1}}, f"logit_bias: must be an integer, not '{'9' * 58}…"),
        ({"stop": "a\ud800"}, "stop: must hold Unicode text, not half of a surrogate pair as in 'a\\ud800'"),
        ({"bad_words": ["\udfff"]}, "bad_words: must hold Unicode text, not half of a surrogate pair as in '\\udfff'"),
        ({"tempurature": 1}, "tempurature: is not a sampling parameter; did you mean temperature?"),
    ]

    async def fault(llm: AsyncLLM) -> None:
        for params, sentence in cases:
            await refused(llm, "a", sentence, params)
        for extreme in ({"top_k": 2**31 - 1}, {"temperature": 5e-324}, {"top_p": 5e-324}, {"seed": 2**64 - 1}):
            output = await last(llm, "a", SamplingParams(max_tokens=4, ignore_eos=True, **extreme))
            assert output.outputs[0].finish_reason == "length"

    beside_neighbours(model_dir, fault)


@pytest.mark.parametrize("letters", ["abc", "é"], ids=["across tokens", "inside a character"])
def test_stop_string_is_cut_exactly(model_dir: Path, letters: str) -> None:
    """A stop string that spans tokens, or begins inside a multi-byte character: cut exactly."""
    params = SamplingParams(seed=9, max_tokens=80, allowed_token_ids=list(letters.encode()))
    with LLM(model_dir) as llm:
        whole = llm.generate("a", params)[0].outputs[0].text
    stop = whole[30:33] if letters == "abc" else "éé"
    expected = whole[: whole.index(stop)]  # of bytes, two or more make up the stop string

    async def fault(llm: AsyncLLM) -> None:
        shown = [output.outputs[0] async for output in llm.generate("a", params.with_(stop=[stop]))]
        assert (shown[-1].text, shown[-1].finish_reason, shown[-1].stop_reason) == (expected, "stop", stop)
        assert all(expected.startswith(part.text) for part in shown)

    beside_neighbours(model_dir, fault)


def test_very_long_word(model_dir: Path) -> None:
    """A very long single-word prompt: the length cap comes first, and tokenizing never blocks the event loop."""

    async def fault(llm: AsyncLLM) -> None:
        sentence = "prompt: 10000000 bytes of text are at least 1428572 tokens, more than the model length 512"
        await refused(llm, "a" * 10_000_000, sentence)
        on_loop, tokenizer = threading.get_ident(), llm.loaded.tokenizer
        assert tokenizer is not None
        word, used, encode = "a" * 480, list[int](), tokenizer.encode

        def noted(text: str, **how: Any) -> list[int]:
            if text == word:  # a neighbour's log-probabilities encode a single letter, once
                used.append(threading.get_ident())
            return encode(text, **how)

        tokenizer.encode = noted  # type: ignore[method-assign]
        output = await last(llm, word, SamplingParams(max_tokens=2, ignore_eos=True))
        assert len(output.prompt_token_ids) == 480
        assert used
        assert on_loop not in used

    beside_neighbours(model_dir, fault)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ messages.__class__ }}", "'{{ messages.__class__ }}' reaches for a Python internal"),
        ("{% import 'os' as os %}", "template not found"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "engine ran out of fuel"),
    ],
    ids=["attribute", "import", "endless loop"],
)
def test_template_that_attacks(model_dir: Path, template: str, sentence: str) -> None:
    """A template that tries attribute access, imports or endless loops: an error in bounded time."""

    async def fault(llm: AsyncLLM) -> None:
        with pytest.raises(InputError) as error:
            await anext(llm.chat([{"role": "user", "content": "Hi"}]))
        assert str(error.value).startswith("chat_template: cannot be rendered: ")
        assert sentence in str(error.value)

    beside_neighbours(model_dir, fault, chat_template=template)
