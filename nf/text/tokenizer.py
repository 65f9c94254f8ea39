"""Tokenizer: text ↔ token ids by the model's own tokenizer.json, and its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from nf.errors import InputError, ModelError, shown
from nf.text.chat_template import ChatPrompt, ChatTemplate
from nf.text.token_length import max_token_bytes


class Tokenizer:
    """A Hugging Face tokenizer. Immutable and safe to use from several threads.

    Control tokens: a plain text is a raw prompt, in which the text of a special token (``<|im_end|>``) becomes that
    token, as in Hugging Face's tokenizers; whoever passes on what others wrote should use a chat, where it never does
    (``nf.text.chat_template``).

    Beginning and end of sequence: ``encode`` adds what tokenizer.json's post-processor adds. If tokenizer_config.json
    says ``add_bos_token`` or ``add_eos_token`` and the post-processor does not do it, they are added all the same.
    (Transformers before 5 did so, too, for Llama tokenizers; from 5 on it leaves them out.)

    Args:
        spec: tokenizer.json's text.
        config: tokenizer_config.json.
        chat_template: a Jinja template; None if the model has none.

    Raises:
        ValueError: ``spec`` is not a tokenizer.
    """

    def __init__(self, spec: str, config: dict[str, Any] | None = None, chat_template: str | None = None) -> None:
        config = config or {}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(spec)
            self.max_token_bytes = max_token_bytes(json.loads(spec))
        except Exception as error:  # tokenizers raises no narrower type
            raise ValueError(str(error)) from error
        self._tokenizer.no_truncation()  # a prompt is never cut in silence
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        self._added_tokens = {token.content: token.special for token in added.values()}
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (_token(config, name) for name in names)
        self._before = self._missing(config, "add_bos_token", self.bos_token_id, 0)
        self._after = self._missing(config, "add_eos_token", self.eos_token_id, -1)
        self.chat_template = None if chat_template is None else self.make_chat_template(chat_template)

    @classmethod
    def from_dir(cls, model_dir: Path | str) -> Tokenizer:
        """Read tokenizer.json and, where there are any, tokenizer_config.json and chat_template.jinja.

        Raises:
            ModelError: tokenizer.json is missing, or a file cannot be used.
        """
        path = Path(model_dir) / "tokenizer.json"
        spec = _read(path)
        if spec is None:
            raise ModelError(str(path), "is missing; nf reads the tokenizer from tokenizer.json alone")
        config_path = path.with_name("tokenizer_config.json")
        config_text = _read(config_path)
        try:
            config = json.loads(config_text or "{}")
        except (ValueError, RecursionError) as error:
            raise ModelError(str(config_path), f"is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ModelError(str(config_path), "must hold a JSON object")
        template = _read(path.with_name("chat_template.jinja"))
        if template is None:
            template = _configured_template(config_path, config.get("chat_template"))
        try:
            return cls(spec, config, template)
        except InputError as error:
            raise ModelError(str(config_path), str(error)) from error
        except ValueError as error:
            raise ModelError(str(path), f"is not a tokenizer that can be read: {error}") from error

    def make_chat_template(self, source: str) -> ChatTemplate:
        """Another chat template for this tokenizer, in place of the model's own."""
        return ChatTemplate(
            source,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            unk_token=self.unk_token,
            pad_token=self.pad_token,
            added_tokens=self._added_tokens,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included; a model's embedding may be padded to more."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: a raw prompt, or a ``ChatPrompt``, to which nothing is added.
            add_special_tokens: add the beginning and end of sequence that the model wants.

        Raises:
            InputError: ``text`` is not Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("prompt", "holds half of a surrogate pair, which is not Unicode text") from error
        if isinstance(text, ChatPrompt):
            return self._encode_chat(text)
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return [*self._before, *ids, *self._after] if add_special_tokens else list(ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that are no token (of a padded embedding) have none."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def is_shown(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether ``decode`` would look at this token at all."""
        if skip_special_tokens and token_id in self._special_ids:
            return False
        return self._tokenizer.id_to_token(token_id) is not None

    def token_text(self, token_id: int) -> str:
        """Text of one token inside a text: leading spaces kept, special tokens shown, parts of characters U+FFFD."""
        before, context = self._inner_context
        return self.decode([*context, token_id], skip_special_tokens=False)[before:]

    @cached_property
    def _inner_context(self) -> tuple[int, list[int]]:
        """Some tokens that stand before a token to be seen as inner, and the length of their text."""
        ids = self.encode("a", add_special_tokens=False)
        return len(self.decode(ids, skip_special_tokens=False)), ids

    def _encode_chat(self, prompt: ChatPrompt) -> list[int]:
        text = str(prompt)
        if not prompt.literals:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        ids: list[int] = []
        at = 0
        for start, stop in (*prompt.literals, (len(text), len(text))):
            ids += _encode_inner(self._tokenizer, text[at:start], first=at == 0)
            ids += self._encode_literal(text[start:stop], first=start == 0)
            at = stop
        return ids

    def _encode_literal(self, text: str, *, first: bool) -> list[int]:
        if not text:
            return []
        ids = _encode_inner(self._plain, text, first=first)
        if self._id(text) in ids:
            raise InputError("messages", f"hold {text!r}, which this tokenizer cannot tell from the control token")
        return ids

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer without added tokens; made when a conversation first spells one."""
        spec = json.loads(self._tokenizer.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": [], "post_processor": None}))

    def _missing(self, config: dict[str, Any], flag: str, token_id: int | None, end: int) -> tuple[int, ...]:
        """The token that ``flag`` asks for at this end of a text, unless the post-processor puts it there."""
        if not config.get(flag) or token_id is None:
            return ()
        ids = self._tokenizer.encode("a").ids
        return () if ids and ids[end] == token_id else (token_id,)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


def _encode_inner(tokenizer: tokenizers.Tokenizer, text: str, *, first: bool) -> list[int]:
    """Tokens of a text, unless ``first`` without the space some tokenizers put before the first word."""
    if not text:
        return []
    if not first:
        newline = tokenizer.encode("\n", add_special_tokens=False).ids
        ids = tokenizer.encode("\n" + text, add_special_tokens=False).ids
        if ids[: len(newline)] == newline:
            return list(ids[len(newline) :])
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _read(path: Path) -> str | None:
    """A file's text; None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(str(path), f"cannot be read: byte {error.start + 1} is not UTF-8") from error


def _token(config: dict[str, Any], name: str) -> str | None:
    """A named token, written as a text or as {"content": text}."""
    value = config.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise InputError(name, f"must be a text or an object with a content, not {shown(value)}")
    return content or None


def _configured_template(path: Path, value: Any) -> str | None:
    """chat_template of tokenizer_config.json: a text, or a list of named ones of which "default" counts."""
    if isinstance(value, list):
        named = [item.get("template") for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[-1] if named else None
    if value is not None and not isinstance(value, str):
        raise ModelError(str(path), "chat_template must be a text or a list of named templates")
    return value
