"""SamplingParams: how the tokens of one request are chosen and when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nf.errors import InputError, shown

MAX_N = 128
MAX_COUNT = 2**31 - 1  # of top_k and max_tokens: executors count in 32 bits
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_TOKEN_LIST = 1024  # of stop_token_ids and of allowed_token_ids
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 4096  # of all bad words together, in all their spellings
MAX_STOP_TOKENS = 2 * MAX_TOKEN_LIST  # of stop_token_ids and the model's own end tokens together


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request; immutable and validated on creation.

    Args:
        n: continuations sampled per prompt, 1 … 128; they share the prompt's KV pages.
        temperature: 0 is greedy; at most 2.
        top_p: keep the smallest set of tokens whose probability reaches this, (0, 1].
        top_k: keep the k most likely tokens, at most 2³¹-1; 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the most likely one, [0, 1].
        presence_penalty, frequency_penalty: subtracted from logits of tokens already generated, once or per
            occurrence, [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output, (0, 2].
        seed: key of the counter-based generator, 0 … 2⁶⁴-1; None takes one from the engine's seed.
        stop: strings that end the text; they are cut off unless ``include_stop_str_in_output``.
        stop_token_ids: token ids that end the text besides the model's EOS.
        bad_words: words that are never completed; at most 4096 tokens in all their spellings together.
        logit_bias: added to the logits of these token ids, [-100, 100].
        allowed_token_ids: if given, no other token is ever sampled.
        ignore_eos: go on after the model's EOS.
        max_tokens: most tokens generated; None means up to the model's length.
        min_tokens: EOS and stop_token_ids are not sampled before this many tokens.
        logprobs: report this many most likely tokens (and the sampled one) per generated token, 0 … 20.
        prompt_logprobs: the same for the prompt's tokens.
        detokenize: False leaves ``text`` empty; stop strings then cannot be used.
        skip_special_tokens: leave special tokens out of ``text``.
        include_stop_str_in_output: keep the stop string at the end of ``text``.

    Raises:
        InputError: a value is out of its range; the message names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_number("temperature", self.temperature, 0.0, 2.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, -1, MAX_COUNT)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 2.0, low_open=True)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_COUNT)
        _check_int("min_tokens", self.min_tokens, 0, MAX_COUNT if self.max_tokens is None else self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(name, f"must be true or false, not {shown(getattr(self, name))}")
        self._freeze_lists()
        if self.n > 1 and self.greedy:
            raise InputError("n", f"{self.n} greedy continuations would be equal; set temperature above 0 or n to 1")
        if self.stop and not self.detokenize:
            raise InputError("stop", "stop strings need detokenize=True; use stop_token_ids without it")

    def _freeze_lists(self) -> None:
        """Turn list-like fields into checked tuples, so that a caller's later edits change nothing."""
        put = object.__setattr__  # the dataclass is frozen for everyone else
        put(self, "top_k", max(self.top_k, 0))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        put(self, "stop", _strings("stop", stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS))
        put(self, "bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_STOP_STRING_CHARS))
        put(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        put(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InputError("allowed_token_ids", "must name at least one token id, or be None to allow all")
        if self.logit_bias is not None:
            put(self, "logit_bias", _bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from parsed JSON; an unknown name is an error that lists the nearest known ones."""
        return cls(**_known(values))

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        return replace(self, **_known(changes))


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(SamplingParams)}
    for name in values:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(name, f"is not a sampling parameter{hint}")
    return dict(values)


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(name, f"must be an integer, not {shown(value)}")
    if value < low or (high is not None and value > high):
        raise InputError(name, f"must be {_range(low, high)}, not {shown(value)}")


def _check_number(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(name, f"must be a number, not {shown(value)}")
    if not low <= value <= high or (low_open and value == low):  # NaN is in no range
        left = "(" if low_open else "["
        raise InputError(name, f"must be in {left}{low:g}, {high:g}], not {shown(value)}")


def _range(low: int, high: int | None) -> str:
    return f"at least {low}" if high is None else f"between {low} and {high}"


def _strings(name: str, values: Any, most: int, most_chars: int) -> tuple[str, ...]:
    if values is None:
        return ()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(name, f"must be a list of strings, not {shown(values)}")
    if len(values) > most:
        raise InputError(name, f"takes at most {most} strings, not {len(values)}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise InputError(name, f"must hold non-empty strings, not {shown(value)}")
        if len(value) > most_chars:
            raise InputError(name, f"takes strings of at most {most_chars} characters, not {len(value)}")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise InputError(name, f"must hold Unicode text, not half of a surrogate pair as in {shown(value)}")
    return tuple(values)


def _token_ids(name: str, values: Any) -> tuple[int, ...] | None:
    if values is None:
        return None if name == "allowed_token_ids" else ()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(name, f"must be a list of token ids, not {shown(values)}")
    if len(values) > MAX_TOKEN_LIST:
        raise InputError(name, f"takes at most {MAX_TOKEN_LIST} token ids, not {len(values)}")
    for value in values:
        _check_int(name, value, 0, None)
    return tuple(values)


_MAX_KEY_DIGITS = 20


def _bias(values: Any) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise InputError("logit_bias", f"must map token ids to numbers, not {shown(values)}")
    if len(values) > MAX_LOGIT_BIAS:
        raise InputError("logit_bias", f"takes at most {MAX_LOGIT_BIAS} token ids, not {len(values)}")
    checked: dict[int, float] = {}
    for key, value in values.items():
        if isinstance(key, str) and key.isdecimal() and len(key) <= _MAX_KEY_DIGITS:
            key = int(key)  # JSON object keys are strings
        _check_int("logit_bias", key, 0, None)
        _check_number("logit_bias", value, -100.0, 100.0)
        checked[key] = float(value)
    return checked
