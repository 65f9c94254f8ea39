"""IncrementalDetokenizer against decoding all at once, StopStrings against a search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, sentencepiece

from nf.text.detokenizer import MAX_WINDOW, IncrementalDetokenizer, StopStrings
from nf.text.tokenizer import Tokenizer

TOKENIZERS = {"byte_level": Tokenizer(byte_level()), "sentencepiece": Tokenizer(sentencepiece())}
KINDS = pytest.mark.parametrize("kind", list(TOKENIZERS))


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool) -> list[str]:
    """The texts returned for the ids in chunks of these sizes, then the rest one by one."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    texts, at = [], 0
    for size in [*sizes, *[1] * len(ids)]:
        texts.append(detokenizer.add(ids[at : at + size]))
        at += size
    return [*texts, detokenizer.finish()]


@KINDS
@settings(deadline=None, max_examples=150)
@given(text=st.text(), sizes=st.lists(st.integers(0, 5), max_size=6), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(kind: str, text: str, sizes: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids, sizes, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@KINDS
@settings(deadline=None, max_examples=100)
@given(data=st.data(), skip=st.booleans())
def test_spaces_and_special_tokens_anywhere(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    special = [tokenizer.encode(text, add_special_tokens=False)[-1] for text in tokenizer._added_tokens]
    words = [token for text in (" a", "  ", "é", "日本", "the dog") for token in tokenizer.encode(text)]
    groups = [[token] for token in special] + [words, tokenizer.encode(" 日本", add_special_tokens=False)]
    ids = [token for group in data.draw(st.lists(st.sampled_from(groups), max_size=12)) for token in group]
    assert "".join(stream(tokenizer, ids, [], skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_any_byte_level_tokens_valid_or_not(data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=60))
    assert "".join(stream(tokenizer, ids, [], skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_invalid_byte_fallback_costs_nothing_around_it(data: st.DataObject) -> None:
    """A run of byte tokens that is not UTF-8 has another number of U+FFFD; all other text is there, in order."""
    tokenizer = TOKENIZERS["sentencepiece"]
    first_byte = tokenizer.encode("\x00", add_special_tokens=False)[-1]
    spelled, high_bytes = st.integers(first_byte + 256, tokenizer.vocab_size + 5), first_byte + 128
    ids = data.draw(st.lists(spelled | st.integers(high_bytes, high_bytes + 127), max_size=60))
    streamed, whole = "".join(stream(tokenizer, ids, [], True)), tokenizer.decode(ids)
    assert [char for char in streamed if char.isascii()] == [char for char in whole if char.isascii()]
    if "\ufffd" not in whole:
        assert streamed == whole


@KINDS
def test_half_a_character_is_never_shown(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    text = "a😀é日本"
    texts = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False), [], True)
    assert "".join(texts) == text
    assert not any("\ufffd" in shown for shown in texts)
    assert len([shown for shown in texts if shown]) >= 4  # character by character, not all at the end


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("x" + "𓂀", add_special_tokens=False)
    assert stream(tokenizer, ids[:-1], [], True)[-1] == "\ufffd"
    assert "".join(stream(tokenizer, ids[:-1], [], True)) == "x\ufffd"


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def is_shown(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        return self._tokenizer.is_shown(token_id, skip_special_tokens=skip_special_tokens)


def test_work_per_token_is_bounded() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    text = tokenizer.encode("the lazy dog sleeps. " * 400, add_special_tokens=False)
    broken = tokenizer.encode("é", add_special_tokens=False)[:1] * 4000
    special = tokenizer.encode("<|end|>", add_special_tokens=False) * 4000
    for ids, most in ((text, 8), (broken, 2 * MAX_WINDOW + 2), (special, 0)):
        counting = Counting(tokenizer)
        detokenizer = IncrementalDetokenizer(counting, skip_special_tokens=True)
        for token in ids:
            detokenizer.add([token])
        assert counting.decoded <= most * len(ids)


def naive(text: str, stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The text cut at the stop string that completes first, of several the longest."""
    for end in range(len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def may_become(text: str, stop: tuple[str, ...]) -> int:
    """Length of the text's longest end that is the beginning of a stop string."""
    starts = [size for string in stop for size in range(1, len(string)) if text.endswith(string[:size])]
    return max(starts, default=0)


LETTERS = st.text(alphabet="ab\n", max_size=12)


@settings(deadline=None, max_examples=400)
@given(
    deltas=st.lists(LETTERS, max_size=8),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_does(
    deltas: list[str], stop: list[str], include: bool
) -> None:
    watch = StopStrings(tuple(stop), include=include)
    shown = taken = ""
    for delta in deltas:
        shown, taken = shown + watch.add(delta), taken + delta
        expected, matched = naive(taken, tuple(stop), include)
        assert watch.matched == matched
        # Not a character later than needed, not one too early.
        assert shown == (expected if matched else taken[: len(taken) - may_become(taken, tuple(stop))])
    assert shown + watch.finish() == naive(taken, tuple(stop), include)[0]


@pytest.mark.parametrize("include", [False, True])
def test_one_delta_with_several_stop_strings(include: bool) -> None:
    watch = StopStrings(("END", "\n\n", "ND"), include=include)
    assert watch.add("a\nEN") == "a\n"
    assert watch.add("D\n\nb") == ("END" if include else "")
    assert watch.matched == "END"
    assert watch.add("more") == "" == watch.finish()


def test_what_cannot_become_a_stop_string_is_shown_at_once() -> None:
    watch = StopStrings(("</s>",), include=False)
    assert [watch.add(char) for char in "a<</b"] == ["a", "", "<", "", "</b"]
    assert watch.matched is None


def test_a_stop_string_inside_a_multi_byte_character_sequence() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    watch = StopStrings(("本語",), include=False)
    ids = tokenizer.encode("日本語です", add_special_tokens=False)
    assert "".join(watch.add(detokenizer.add([token])) for token in ids) == "日"
    assert watch.matched == "本語"
