"""Options that commands share: SamplingParams and EngineConfig as flags. A flag left out is left to the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

from nf.config import Device, DType, Preemption
from nf.errors import InputError
from nf.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 256

_Group = argparse._ArgumentGroup


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Every field of SamplingParams that makes sense on a command line, under its own name."""
    group = parser.add_argument_group(
        "sampling", "What is left out comes from the model's generation_config.json, then from SamplingParams."
    )
    _number(group, "--max-tokens", _integer, "N", f"most tokens to generate (default {DEFAULT_MAX_TOKENS})")
    _number(group, "--min-tokens", _integer, "N", "no end of text before this many tokens")
    _number(group, "--temperature", _real, "T", "0 takes the most likely token; at most 2")
    _number(group, "--top-p", _real, "P", "keep the likeliest tokens that add up to this probability")
    _number(group, "--top-k", _integer, "K", "keep the K likeliest tokens; 0 keeps all")
    _number(group, "--min-p", _real, "P", "drop tokens below this fraction of the likeliest one")
    _number(group, "--seed", _integer, "S", "another seed gives other texts (default 0)")
    _number(group, "--n", _integer, "N", "continuations of each prompt")
    group.add_argument("--stop", action="append", metavar="STR", help="end the text here; may be repeated")
    _ids(group, "--stop-token-ids", "end the text at these token ids")
    _switch(group, "--include-stop-str-in-output", "keep the stop string at the end of the text")
    _switch(group, "--ignore-eos", "go on after the model's end of text")
    _number(group, "--presence-penalty", _real, "X", "lower tokens already generated, once; -2 … 2")
    _number(group, "--frequency-penalty", _real, "X", "lower tokens already generated, each time; -2 … 2")
    _number(group, "--repetition-penalty", _real, "X", "lower tokens of prompt and text if above 1")
    group.add_argument("--bad-words", action="append", metavar="WORD", help="never say this; may be repeated")
    _ids(group, "--allowed-token-ids", "sample no other tokens")
    group.add_argument("--logit-bias", type=_bias, metavar="ID:X,…", help="add X to the logit of token ID")
    _number(group, "--logprobs", _integer, "K", "report the K likeliest tokens at each position (JSON)")
    _number(group, "--prompt-logprobs", _integer, "K", "the same for the prompt's tokens (JSON)")
    group.add_argument(
        "--keep-special-tokens",
        dest="skip_special_tokens",
        action="store_false",
        default=None,
        help="show special tokens in the text",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How the model is run."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", choices=get_args(Device), metavar="NAME", help="auto, cpu or cuda")
    group.add_argument(
        "--dtype",
        choices=get_args(DType),
        metavar="NAME",
        help="auto, bfloat16, float16 or float32",
    )
    _number(group, "--max-model-len", _integer, "N", "most tokens of prompt and text together")
    _number(group, "--max-num-seqs", _integer, "N", "most sequences running at a time (default 256, GPU 2048)")
    _number(group, "--max-num-batched-tokens", _integer, "N", "size of the dense batch, tokens per step")
    _number(group, "--gpu-memory-utilization", _real, "X", "share of the GPU's memory to use")
    _number(group, "--page-size", _integer, "N", "tokens per page of the KV cache")
    _number(group, "--num-pages", _integer, "N", "pages of the KV cache (default: what memory allows)")
    _number(group, "--num-host-pages", _integer, "N", "pages in RAM for preempted sequences")
    group.add_argument("--preemption", choices=get_args(Preemption), metavar="NAME", help="auto, swap or recompute")
    _number(group, "--tensor-parallel-size", _integer, "N", "GPUs that share the model")
    group.add_argument(
        "--plan",
        metavar="NAME|FILE",
        help="pipeline plan: a built-in name, a JSON file, or auto (the fastest known for each step)",
    )


ENGINE_OPTIONS = (
    "device", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "page_size",
    "num_pages", "num_host_pages", "preemption", "tensor_parallel_size", "plan",
)  # fmt: skip
_FLAGS = frozenset((
    *ENGINE_OPTIONS, *SamplingParams.__dataclass_fields__, "chat_template", "arch", "dense_batch_size", "input_len",
    "output_len",
))  # fmt: skip


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by their names in EngineConfig."""
    given = {name: getattr(args, name) for name in ENGINE_OPTIONS if getattr(args, name) is not None}
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        if given.get(name, 1) < 1:
            raise InputError(f"--{name.replace('_', '-')}", f"must be at least 1, not {given[name]}")
    return given


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, by their names in SamplingParams; each is in its range.

    Raises:
        InputError: naming the flag.
    """
    names = SamplingParams.__dataclass_fields__
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    with named_by_flag():
        SamplingParams.from_dict({"temperature": 1.0, "max_tokens": None} | given)
    return given


@contextmanager
def named_by_flag(**flags: str) -> Iterator[None]:
    """Errors about a parameter name the flag that sets it; ``flags`` are those that have another name."""
    try:
        yield
    except InputError as error:
        if error.field not in _FLAGS | flags.keys():
            raise
        message = str(error).removeprefix(f"{error.field}: ")
        raise type(error)(flags.get(error.field) or f"--{error.field.replace('_', '-')}", message) from error


def _number(group: _Group, flag: str, type_: Callable[[str], float], metavar: str, help_: str) -> None:
    group.add_argument(flag, type=type_, metavar=metavar, help=help_)


def _switch(group: _Group, flag: str, help_: str) -> None:
    group.add_argument(flag, action="store_const", const=True, help=help_)


def _ids(group: _Group, flag: str, help_: str) -> None:
    group.add_argument(flag, type=_token_ids, metavar="ID,…", help=help_)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, not {text!r}") from None


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes token ids such as 13,198, not {text!r}") from None


def _bias(text: str) -> dict[int, float]:
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(token): float(value) for token, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes pairs such as 13:-100,198:5, not {text!r}") from None
