"""The options of LLM and AsyncLLM: their names, and EngineConfig made of those that it knows."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields
from typing import Any, TypedDict, get_args

from nf.config import Device, DType, EngineConfig, Preemption
from nf.errors import InputError, shown


class TextOptions(TypedDict, total=False):
    """How text is handled."""

    tokenizer: str | os.PathLike[str] | None
    chat_template: str | None
    skip_tokenizer_init: bool


class Options(TextOptions, total=False):
    """Keyword arguments of LLM and AsyncLLM: EngineConfig's fields, and how text is handled."""

    dtype: DType
    seed: int
    max_model_len: int | None
    gpu_memory_utilization: float
    tensor_parallel_size: int
    max_num_seqs: int | None
    max_num_batched_tokens: int
    page_size: int
    num_pages: int | None
    num_host_pages: int | None
    preemption: Preemption
    device: Device
    plan: str | os.PathLike[str] | None
    random_weights: bool


def read_options(options: Options) -> tuple[EngineConfig, TextOptions]:
    """EngineConfig of the options that it knows, and the ones about text; every value is in its range."""
    known = {field.name for field in fields(EngineConfig)}
    for name in options:
        if name not in known | _TEXT_OPTIONS:
            near = " or ".join(difflib.get_close_matches(name, sorted(known | _TEXT_OPTIONS), n=3))
            raise InputError(name, f"is not an option{f'; did you mean {near}?' if near else ''}")
    given: dict[str, Any] = {name: value for name, value in options.items() if name in known}
    if isinstance(given.get("plan"), os.PathLike):
        given["plan"] = os.fspath(given["plan"])
    if given.get("plan") == "auto":
        given["plan"] = None
    config = EngineConfig(**given)
    _check(config)
    text: dict[str, Any] = {name: value for name, value in options.items() if name in _TEXT_OPTIONS}
    return config, TextOptions(**text)  # type: ignore[typeddict-item]


_TEXT_OPTIONS = frozenset(TextOptions.__annotations__)


def _check(config: EngineConfig) -> None:
    for name, choices in (("dtype", DType), ("device", Device), ("preemption", Preemption)):
        if getattr(config, name) not in get_args(choices):
            raise InputError(name, f"must be one of {', '.join(get_args(choices))}, not {shown(getattr(config, name))}")
    for name, low, high, optional in _INTEGERS:
        value = getattr(config, name)
        if optional and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(name, f"must be an integer of at least {low}, not {shown(value)}")
        if value > high:
            raise InputError(name, f"must be at most {high}, not {shown(value)}")
    share = config.gpu_memory_utilization
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError("gpu_memory_utilization", f"must be in (0, 1], not {shown(share)}")
    if config.plan is not None and not isinstance(config.plan, str):
        raise InputError("plan", f"must be the name of a plan or of a JSON file, not {shown(config.plan)}")
    if not isinstance(config.random_weights, bool):
        raise InputError("random_weights", f"must be true or false, not {shown(config.random_weights)}")
    if config.tensor_parallel_size != 1:
        asked = config.tensor_parallel_size
        raise InputError("tensor_parallel_size", f"must be 1, a model runs on one device, not {asked}")


_MOST = 2**31 - 1  # steps are described by int32 arrays
_INTEGERS = (
    ("seed", 0, 2**64 - 1, False),
    ("max_model_len", 1, _MOST, True),
    ("tensor_parallel_size", 1, _MOST, False),
    ("max_num_seqs", 1, _MOST, True),
    ("max_num_batched_tokens", 1, _MOST, False),
    ("page_size", 1, _MOST, False),
    ("num_pages", 1, _MOST, True),
    ("num_host_pages", 0, _MOST, True),
)  # field, least and greatest value, whether None is a value
