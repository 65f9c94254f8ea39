"""Inputs: what a user gives to ``generate`` or ``chat``, checked against the model and turned into Requests."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from nf.errors import InputError, shown
from nf.limits import NO_TOKENIZER, Limits
from nf.request import Request
from nf.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nf.text.chat_template import ChatTemplate
    from nf.text.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or a mapping with ``prompt_token_ids`` or ``prompt``."""

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: mappings with ``role`` and ``content``."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a request gets at the moment of the call, so that it does not depend on how long tokenizing takes.

    Args:
        number: running number among the prompts given to this engine.
        request_id: the user's, or one made of the number.
        arrival_time: seconds of the monotonic clock.
    """

    number: int
    request_id: str
    arrival_time: float


class Inputs:
    """Makes Requests, or says which input is wrong and why. Its only state is a running number, so threads share it.

    The n-th prompt that it numbers samples with a key derived from (seed, n) where its parameters name no seed: the
    same calls on an engine with the same seed give the same tokens.

    Args:
        limits: what the model and the engine accept.
        tokenizer: None if only token ids are taken.
        chat_template: renders conversations; None if the model has none.
        eos_token_ids: tokens that end a sequence unless ``ignore_eos``.
        default_params: used where a call gives no parameters.
        seed: the engine's.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        eos_token_ids: Sequence[int] = (),
        default_params: SamplingParams | None = None,
        seed: int = 0,
    ) -> None:
        self.default_params = default_params or SamplingParams()
        self._limits = limits
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._eos_token_ids = tuple(eos_token_ids)
        self._seed = seed
        self._numbers = itertools.count()

    def ticket(self, request_id: str | None = None) -> Ticket:
        """Take the next running number."""
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise InputError("request_id", f"must be a non-empty string, not {shown(request_id)}")
        number = next(self._numbers)
        return Ticket(number, f"nf-{number}" if request_id is None else request_id, time.monotonic())

    def close(self) -> None:
        """End what runs for the chat template."""
        if self._chat_template is not None:
            self._chat_template.close()

    def requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        """A request for each prompt, all checked; a flat list of token ids is one prompt."""
        names, listed = _listed(prompts)
        each = self._params_of_each(len(names), params)
        return [
            self.request(name, prompt, one, self.ticket(), params_field=params_field)
            for name, prompt, (params_field, one) in zip(names, listed, each, strict=True)
        ]

    def chat_requests(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None,
        template: Mapping[str, Any],
    ) -> list[Request]:
        """A request for each conversation, all checked; a flat list of messages is one conversation."""
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise InputError("messages", "must be a list of messages, or a list of such lists")
        one_chat = not messages or isinstance(messages[0], Mapping)
        chats: list[Any] = [messages] if one_chat else list(messages)
        names = ["messages"] if one_chat else [f"messages[{index}]" for index in range(len(chats))]
        each = self._params_of_each(len(names), params)
        return [
            self.chat_request(name, chat, one, self.ticket(), template, params_field=params_field)
            for name, chat, (params_field, one) in zip(names, chats, each, strict=True)
        ]

    def _params_of_each(
        self, count: int, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[str, SamplingParams]]:
        """Parameters of each of ``count`` prompts, with what errors put before the name of a field of theirs."""
        if params is None or isinstance(params, SamplingParams):
            return [("", self.default_params if params is None else params)] * count
        if not isinstance(params, Sequence):
            raise InputError("sampling_params", f"must be SamplingParams or a list of them, not {shown(params)}")
        if len(params) != count:
            raise InputError("sampling_params", f"holds {len(params)} entries for {count} prompts; give one for each")
        for index, one in enumerate(params):
            if not isinstance(one, SamplingParams):
                raise InputError(f"sampling_params[{index}]", f"must be SamplingParams, not {shown(one)}")
        return [(f"sampling_params[{index}].", one) for index, one in enumerate(params)]

    def request(
        self,
        field: str,
        prompt: Prompt,
        params: SamplingParams | None,
        ticket: Ticket,
        *,
        params_field: str = "",
        add_special_tokens: bool = True,
    ) -> Request:
        """Tokenize and check one prompt; errors are about ``field`` or ``params_field`` + a field of ``params``."""
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise InputError("sampling_params", f"must be SamplingParams, not {shown(params)}")
        text, token_ids = self._tokens(field, prompt, add_special_tokens)
        params = self._limits.check_length(field, len(token_ids), params, params_field)
        stop_token_ids = () if params.ignore_eos else self._eos_token_ids
        request = Request(
            request_id=ticket.request_id,
            prompt_token_ids=token_ids,
            params=params,
            seed=request_seed(self._seed, ticket.number) if params.seed is None else params.seed,
            stop_token_ids=tuple(sorted({*stop_token_ids, *(params.stop_token_ids or ())})),
            bad_words=self._bad_words(params),
            prompt=None if text is None else str(text),  # a rendered conversation is more than a str
            arrival_time=ticket.arrival_time,
        )
        self._limits.check_params(request, params_field)
        return request

    def chat_request(
        self,
        field: str,
        messages: Messages,
        params: SamplingParams | None,
        ticket: Ticket,
        template: Mapping[str, Any],
        *,
        params_field: str = "",
    ) -> Request:
        """Render one conversation with the model's chat template, which writes its own special tokens."""
        if self._tokenizer is None:
            raise InputError(field, f"a conversation {NO_TOKENIZER}")
        if self._chat_template is None:
            raise InputError(field, "the model has no chat template; give one with chat_template=…")
        try:
            text = self._chat_template.render(messages, **template)
        except InputError as error:
            sentence = str(error).removeprefix(f"{error.field}: ")
            raise InputError(error.field.replace("messages", field, 1), sentence) from error
        return self.request(field, text, params, ticket, params_field=params_field, add_special_tokens=False)

    def _tokens(self, field: str, prompt: Prompt, add_special_tokens: bool) -> tuple[str | None, NDArray[np.int32]]:
        """The text, where there is one, and int32 token ids [prompt_len]."""
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or len(prompt) != 1:
                raise InputError(field, f"must hold prompt_token_ids or prompt, and holds {sorted(map(str, prompt))}")
            ((name, value),) = prompt.items()
            field = f"{field}.{name}"
            if isinstance(value, str) != (name == "prompt"):
                raise InputError(field, f"must be {'a text' if name == 'prompt' else 'token ids'}, not {shown(value)}")
            prompt = value
        if isinstance(prompt, str):
            return prompt, self._limits.token_ids(field, self._encode(field, prompt, add_special_tokens))
        if not _is_list(prompt):
            raise InputError(field, f"must be a text, a list of token ids or a mapping, not {type(prompt).__name__}")
        return None, self._limits.token_ids(field, cast(Sequence[int], prompt))

    def _encode(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        if self._tokenizer is None:
            raise InputError(field, f"a text {NO_TOKENIZER}; give token ids")
        if not text:
            raise InputError(field, "is empty; give at least one character")
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise InputError(field, f"character {error.start} is half of a surrogate pair, not Unicode text") from error
        # Tokenizing can take time that grows faster than the text, so what cannot fit is refused before it.
        least = -(-num_bytes // self._tokenizer.max_token_bytes)
        if least > self._limits.max_model_len:
            raise InputError(
                field,
                f"{num_bytes} bytes of text are at least {least} tokens, more than the model length "
                f"{self._limits.max_model_len}",
            )
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each word as it is spelled at the start of a text and after a space."""
        if self._tokenizer is None:
            return ()
        spelled: dict[tuple[int, ...], None] = {}
        for word in params.bad_words or ():
            for text in (word, " " + word.lstrip()):
                token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
                if token_ids:
                    spelled[token_ids] = None
        return tuple(spelled)


def template_variables(
    add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] | None, others: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Keyword arguments of ``ChatTemplate.render``, once none is given twice."""
    named = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    if others is not None and not isinstance(others, Mapping):
        raise InputError("chat_template_kwargs", f"must map names to values, not {shown(others)}")
    for name in others or {}:
        if not isinstance(name, str) or name in {*named, "messages"}:
            raise InputError("chat_template_kwargs", f"must not hold {shown(name)}; it has an argument of its own")
    return {**named, **(others or {})}


def request_seed(engine_seed: int, number: int) -> int:
    """Philox key of the engine's ``number``-th request: 64 bits of BLAKE2b over both numbers."""
    digest = hashlib.blake2b(f"{engine_seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _listed(prompts: Prompt | Sequence[Prompt]) -> tuple[list[str], list[Prompt]]:
    """Each prompt, with what errors call it."""
    if isinstance(prompts, str | Mapping) or _is_token_ids(prompts):
        return ["prompts"], [cast(Prompt, prompts)]
    if not _is_list(prompts):
        raise InputError("prompts", f"must be a text, token ids, or a list of such, not {type(prompts).__name__}")
    if len(prompts) == 0:
        raise InputError("prompts", "is empty; give at least one prompt")
    return [f"prompts[{index}]" for index in range(len(prompts))], cast(list[Prompt], list(prompts))


def _is_token_ids(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu" and len(value) > 0
    return _is_list(value) and len(value) > 0 and isinstance(value[0], int | np.integer)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Lists, tuples, arrays; bytes are a text that was not decoded, whatever Python says."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
