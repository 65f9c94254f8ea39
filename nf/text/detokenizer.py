"""From token ids to text as they come: complete characters only, and nothing of a stop string that may yet complete."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not, or not yet, a character
MAX_WINDOW = 256  # tokens; only a run of this many tokens of invalid bytes is ever cut


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str: ...

    def is_shown(self, token_id: int, *, skip_special_tokens: bool) -> bool: ...


class IncrementalDetokenizer:
    """Decodes a growing sequence of tokens; all that it returns, joined, is the text of the whole sequence.

    Tokens are decoded in a window: those of the last complete text, which give the decoder its context (leading
    spaces, runs of byte tokens), and those since. A window advances when its text ends in a complete character, so a
    token is decoded a bounded number of times. Text that ends in U+FFFD is held back, for it may be half a character.
    For bytes that are not UTF-8 the number of U+FFFD may differ from that of decoding all at once.

    Args:
        tokenizer: decodes.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Decoder, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._context = 0  # tokens at the window's start whose text has been returned
        self._shown = 0  # characters of the window's text that have been returned

    def add(self, ids: Iterable[int]) -> str:
        """Take tokens and return the text that is now complete, possibly empty."""
        shown = [token for token in ids if self._tokenizer.is_shown(token, skip_special_tokens=self._skip)]
        if not shown:
            return ""
        self._window += shown
        text = self._decode()
        complete = text.rstrip(REPLACEMENT)
        if len(complete) == len(text) or len(self._window) - self._context > MAX_WINDOW:
            return self._advance(text)
        new = complete[self._shown :]
        self._shown += len(new)
        return new

    def finish(self) -> str:
        """The text held back, incomplete characters as U+FFFD; the sequence has ended."""
        return self._advance(self._decode())

    def _advance(self, text: str) -> str:
        new = text[self._shown :]
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._shown = len(self._decode())
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)


class StopStrings:
    """Watches text for stop strings; the one that completes first ends it, of several at once the longest.

    Every string is matched by its own Knuth-Morris-Pratt automaton, so the cost of a character does not depend on the
    strings' lengths, and the automata's states say how much of the text's end may still become a stop string.

    Args:
        stop: non-empty strings.
        include: keep the stop string at the end of the text.
    """

    def __init__(self, stop: tuple[str, ...], *, include: bool) -> None:
        assert all(stop), "stop strings are not empty"
        self.matched: str | None = None
        self._stop = [(string, _borders(string)) for string in stop]
        self._states = [0] * len(stop)  # characters of each string that the text ends with
        self._include = include
        self._held = ""

    def add(self, text: str) -> str:
        """Take text and return what may be shown now; after a match, nothing."""
        if self.matched is not None:
            return ""
        held = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            self._step(char)
            if self.matched is not None:
                self._held = ""
                return held[:end] if self._include else held[: end - len(self.matched)]
        show = len(held) - max(self._states, default=0)
        self._held = held[show:]
        return held[:show]

    def finish(self) -> str:
        """The text held back, which no longer can become a stop string."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stop)
        return held

    def _step(self, char: str) -> None:
        for index, (string, borders) in enumerate(self._stop):
            state = self._states[index]
            while state and string[state] != char:
                state = borders[state - 1]
            state += string[state] == char
            self._states[index] = state
            if state == len(string) > len(self.matched or ""):
                self.matched = string


def _borders(string: str) -> list[int]:
    """For each prefix, the length of the longest proper prefix that also ends it."""
    borders = [0] * len(string)
    for index in range(1, len(string)):
        length = borders[index - 1]
        while length and string[length] != string[index]:
            length = borders[length - 1]
        borders[index] = length + (string[length] == string[index])
    return borders
