"""Tokenizer: files and their faults, special tokens, the bound on bytes per token."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, sentencepiece
from tokenizers import Tokenizer as Reference

from nf.errors import InputError, ModelError
from nf.text.tokenizer import Tokenizer

SPECS = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}
KINDS = pytest.mark.parametrize("kind", list(SPECS))


def write(path: Path, kind: str = "byte_level", config: Any = None, template: str | None = None) -> Path:
    (path / "tokenizer.json").write_text(SPECS[kind], encoding="utf-8")
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def edited(kind: str, **changes: Any) -> str:
    return json.dumps({**json.loads(SPECS[kind]), **changes})


@KINDS
@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_equals_the_tokenizers_library(kind: str, text: str) -> None:
    ours, reference = Tokenizer(SPECS[kind]), Reference.from_str(SPECS[kind])
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == reference.encode(text, add_special_tokens=special).ids
        assert ours.decode(ids, skip_special_tokens=special) == reference.decode(ids, skip_special_tokens=special)


def test_named_tokens_and_template_from_a_directory(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<|begin|>", "special": True}, "eos_token": "<|end|>", "pad_token": None}
    tokenizer = Tokenizer.from_dir(write(tmp_path, config=config, template="{{ bos_token }}!{{ pad_token }}"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", None)
    assert tokenizer.decode([tokenizer.bos_token_id or 0], skip_special_tokens=False) == "<|begin|>"
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([{"role": "user", "content": "x"}]) == "<|begin|>!"
    assert tokenizer.vocab_size == Reference.from_str(SPECS["byte_level"]).get_vocab_size()


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("a", "a"),
        ([{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": "tool_use", "template": "b"}], None),
        (None, None),
    ],
)
def test_configured_chat_templates(tmp_path: Path, value: Any, source: str | None) -> None:
    template = Tokenizer.from_dir(write(tmp_path, config={"chat_template": value})).chat_template
    assert (template and template.source) == source


def test_the_template_file_comes_first_and_may_be_replaced(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write(tmp_path, config={"chat_template": "a", "eos_token": "</s>"}, template="b"))
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.source == "b"
    assert tokenizer.make_chat_template("c{{ eos_token }}").render([{"role": "user", "content": "x"}]) == "c</s>"


def test_only_tokenizer_json_is_needed(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write(tmp_path))
    assert tokenizer.chat_template is None
    assert tokenizer.bos_token is None


def test_faulty_directories(tmp_path: Path) -> None:
    def error() -> str:
        with pytest.raises(ModelError) as caught:
            Tokenizer.from_dir(tmp_path)
        return str(caught.value).replace(f"{tmp_path}/", "")

    assert error() == "tokenizer.json: is missing; nf reads the tokenizer from tokenizer.json alone"
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert error().startswith("tokenizer.json: is not a tokenizer that can be read: ")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert error().startswith("tokenizer.json: cannot be read: ")
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert error().startswith("tokenizer_config.json: is not JSON: ")
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    assert error().startswith("tokenizer_config.json: is not JSON: ")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").mkdir()
    assert error() == "tokenizer_config.json: cannot be read: Is a directory"
    (tmp_path / "tokenizer_config.json").rmdir()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert error() == "tokenizer_config.json: must hold a JSON object"
    write(tmp_path, config={"bos_token": 5})
    assert error() == "tokenizer_config.json: bos_token: must be a text or an object with a content, not 5"
    write(tmp_path, config={"chat_template": 5})
    assert error() == "tokenizer_config.json: chat_template must be a text or a list of named templates"


def test_truncation_and_padding_in_the_file_are_off() -> None:
    reference = Reference.from_str(SPECS["byte_level"])
    reference.enable_truncation(2)
    reference.enable_padding(length=5)
    assert Tokenizer(reference.to_str()).encode("lazy dog xyz") == Tokenizer(SPECS["byte_level"]).encode("lazy dog xyz")


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_beginning_is_added_once(flags: dict[str, bool]) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert Tokenizer(SPECS["sentencepiece"], {**tokens, **flags}).encode("a").count(1) == 1  # tokenizer.json adds it
    tokens = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    bare = Tokenizer(SPECS["byte_level"], tokens)
    wants = Tokenizer(SPECS["byte_level"], {**tokens, **flags})
    begin = [bare.bos_token_id] if flags.get("add_bos_token") else []
    assert wants.encode("a") == begin + bare.encode("a")
    assert wants.encode("a", add_special_tokens=False) == bare.encode("a")
    ends = Tokenizer(SPECS["byte_level"], {**tokens, "add_eos_token": True})
    assert ends.encode("a") == [*bare.encode("a"), bare.eos_token_id]


def test_special_tokens_in_a_raw_prompt_are_parsed_and_skipped_on_decoding() -> None:
    tokenizer = Tokenizer(SPECS["byte_level"])
    ids = tokenizer.encode("a<|end|><user>")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "a<user>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|end|><user>"


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    tokenizer = Tokenizer(SPECS["byte_level"])
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size + 7]) == "a"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="prompt: holds half of a surrogate pair"):
        Tokenizer(SPECS["byte_level"]).encode("a\ud800")


@KINDS
def test_token_texts_make_up_the_text(kind: str) -> None:
    tokenizer = Tokenizer(SPECS[kind])
    ids = tokenizer.encode("the lazy  dog", add_special_tokens=False)
    texts = [tokenizer.token_text(token) for token in ids]
    assert "".join(texts).strip(" ") == "the lazy  dog"
    assert any(text.startswith(" ") for text in texts[1:])
    assert tokenizer.token_text(tokenizer.encode("😀", add_special_tokens=False)[-1]) == "\ufffd"
    assert tokenizer.token_text(tokenizer.vocab_size + 7) == ""


def test_the_text_of_a_special_token_is_shown() -> None:
    tokenizer = Tokenizer(SPECS["byte_level"])
    assert tokenizer.token_text(tokenizer.encode("<|end|>")[0]) == "<|end|>"


@KINDS
@settings(deadline=None, max_examples=200)
@given(
    text=st.text() | st.text(alphabet="ab \n▁é日", max_size=200) | st.text(alphabet="\u1fbe\u0308\u0301", max_size=30)
)
def test_no_text_has_fewer_tokens_than_the_bound_says(kind: str, text: str) -> None:
    tokenizer = Tokenizer(SPECS[kind])
    assert len(text.encode()) <= tokenizer.max_token_bytes * len(tokenizer.encode(text, add_special_tokens=False))


def test_the_bound_is_the_longest_token() -> None:
    longest = max(len(text.encode()) for text in Reference.from_str(SPECS["sentencepiece"]).get_vocab())
    assert Tokenizer(SPECS["sentencepiece"]).max_token_bytes == longest
    # NFC can make one character of more bytes than it has itself, at most 3.5 times as many.
    without = Tokenizer(edited("byte_level", normalizer=None)).max_token_bytes
    assert Tokenizer(SPECS["byte_level"]).max_token_bytes == 4 * without


def test_composition_shrinks_at_most_four_times() -> None:
    """Every character that composition yields, against the longest spelling of each of its parts."""
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    longest: dict[str, int] = {}
    composed = []
    for char in characters:
        parts = unicodedata.normalize("NFD", char)
        if len(parts) == 1:
            longest[parts] = max(longest.get(parts, 0), len(char.encode()), len(parts.encode()))
        if parts != char:
            composed.append((unicodedata.normalize("NFC", char), parts))
    for char, parts in composed:
        assert sum(longest[part] for part in parts) <= 4 * len(char.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "long"}, "content": ""}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed", "invert": False}},
        {"added_tokens": [{**json.loads(SPECS["byte_level"])["added_tokens"][0], "rstrip": True}]},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
    ],
)
def test_no_bound_where_text_may_vanish(change: dict[str, Any]) -> None:
    assert Tokenizer(edited("byte_level", **change)).max_token_bytes == sys.maxsize
