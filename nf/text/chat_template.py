"""Chat templates: a conversation becomes the text a model was trained on, as Hugging Face renders it.

What users write cannot forge control tokens. Where their text spells one, it is rendered as usual, but remembered as
literal, and ``Tokenizer.encode`` makes ordinary tokens of it. Conversations without such text are encoded in one
piece, so their tokens are those of Hugging Face's tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nf.errors import InputError
from nf.text.template_process import TemplateProcess

# Noncharacters, which no text holds on purpose, stand around control tokens in what users wrote during rendering.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


class ChatPrompt(str):
    """A rendered conversation.

    It is complete: encoding adds nothing to it. ``literals`` are ranges of characters that no control token is made
    of; an empty range still separates what stands on its two sides.
    """

    literals: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, literals: Sequence[tuple[int, int]] = ()) -> ChatPrompt:
        prompt = super().__new__(cls, text)
        prompt.literals = tuple(literals)
        return prompt


class ChatTemplate:
    """A model's chat template in a sandbox: bounded steps, time, memory and output; no files, no Python.

    Control tokens are those marked special and, but in the assistant's own messages (which hold its ``<think>``), the
    added tokens that the template itself writes. Whoever wants them parsed in a text gives it as a raw prompt.

    Args:
        source: Jinja template.
        bos_token, eos_token, unk_token, pad_token: texts, as the template's variables.
        added_tokens: text of each of the tokenizer's added tokens → whether it is marked special.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        unk_token: str | None = None,
        pad_token: str | None = None,
        added_tokens: Mapping[str, bool] | None = None,
    ) -> None:
        if not isinstance(source, str):
            raise InputError("chat_template", f"must be a Jinja template's text, not {type(source).__name__}")
        self.source = source
        named = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        self._special = {name: token for name, token in named.items() if token is not None}
        tokens = added_tokens or {}
        always = [text for text, special in tokens.items() if special]
        written = [text for text in tokens if not tokens[text] and text in source and not text.isspace()]
        self._always = _any_of(always)
        self._control = _any_of(always + written)
        self._marked = re.compile(f"{OPEN}({self._control.pattern}){CLOSE}|[{OPEN}{CLOSE}]")
        self._process = TemplateProcess(source)

    def render(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> ChatPrompt:
        """The conversation as text.

        Args:
            messages: mappings with a ``role`` and a ``content``: a string or a list of ``{"type": "text", "text": …}``,
                which are joined by newlines; None is accepted beside ``tool_calls``. Other keys reach the template.
            add_generation_prompt: end with the beginning of the assistant's answer.
            tools: JSON descriptions of functions.
            variables: further JSON values for the template, e.g. ``enable_thinking``.

        Raises:
            InputError: a message is malformed, or the template fails, refuses the messages or exceeds a bound.
        """
        checked = _check_messages(messages)
        shape = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        spelled = _to_json({**variables, **shape, "messages": checked})
        given = json.loads(spelled)  # so that what is searched for control tokens is what the template sees
        own = {**self._special, "documents": None}
        marked = self._mark(given)
        if marked == given:
            return ChatPrompt(self._process.render({**own, **given}))
        if OPEN in spelled or CLOSE in spelled:
            raise InputError("messages", "hold a control token's text together with U+FDD0 or U+FDD1; remove either")
        return self._unmark(self._process.render({**own, **marked}))

    def close(self) -> None:
        """End the process that renders; another rendering starts a new one."""
        self._process.close()

    def _mark(self, given: dict[str, Any]) -> dict[str, Any]:
        """``given`` with marks around the control tokens in its strings."""
        messages = [
            _mark_strings(message, self._always if message["role"] == "assistant" else self._control)
            for message in given["messages"]
        ]
        rest = {name: _mark_strings(value, self._control) for name, value in given.items() if name != "messages"}
        return {**rest, "messages": messages}

    def _unmark(self, text: str) -> ChatPrompt:
        """Take the marks out again. A mark that the template tore from its pair still separates."""
        pieces: list[str] = []
        literals: list[tuple[int, int]] = []
        at = length = 0
        for match in self._marked.finditer(text):
            literal = match[1] or ""
            pieces += (text[at : match.start()], literal)
            start = length + match.start() - at
            length = start + len(literal)
            literals.append((start, length))
            at = match.end()
        return ChatPrompt("".join([*pieces, text[at:]]), literals)


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise InputError("messages", "must be a list of at least one mapping with role and content")
    return [_check_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _check_message(field: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(field, f"must be a mapping with role and content, not {type(message).__name__}")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise InputError(f"{field}.role", "must be a text such as system, user or assistant")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)
    if not isinstance(content, str):
        content = _join_parts(f"{field}.content", content)
    return {**message, "content": content}


def _join_parts(field: str, parts: Any) -> str:
    if not isinstance(parts, Sequence) or not parts:
        raise InputError(field, 'must be a text or a list of {"type": "text", "text": …}')
    for index, part in enumerate(parts):
        known = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not known:
            raise InputError(f"{field}[{index}]", 'must be {"type": "text", "text": …}; nothing but text is taken')
    return "\n".join(part["text"] for part in parts)


def _to_json(given: dict[str, Any]) -> str:
    try:
        text = json.dumps(given, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("messages", "hold half of a surrogate pair, which is not Unicode text") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError("messages", f"and the template's variables must be JSON values: {error}") from error
    return text


def _mark_strings(value: Any, control: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return control.sub(f"{OPEN}\\g<0>{CLOSE}", value)
    if isinstance(value, dict):
        return {key: _mark_strings(item, control) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_strings(item, control) for item in value]
    return value


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the tokens, of several the longest."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
