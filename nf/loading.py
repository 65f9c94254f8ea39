"""From a model's name and the user's options to everything an engine needs; what can be wrong is found before work."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, get_args

import ml_dtypes
import numpy as np

from nf.config import Device, DType, EngineConfig, ModelConfig, Preemption
from nf.errors import InputError, ModelError, PlanError, shown
from nf.executors.base import Executor
from nf.executors.cpu import CpuExecutor
from nf.graphs.plan import BUILT_IN, PipelinePlan, load_plan
from nf.hub import resolve_model
from nf.inputs import Inputs
from nf.limits import Limits
from nf.memory_budget import (
    free_ram,
    kv_bytes_per_token,
    mebibytes,
    pool_sizes,
    recompute_bytes_per_token,
    weight_bytes,
)
from nf.models.declaration import Model
from nf.models.hf_config import read_config, read_sampling_defaults
from nf.models.registry import declare
from nf.sampling_params import SamplingParams
from nf.scheduler.scheduler import Scheduler, SchedulerConfig
from nf.weights import load_weights

if TYPE_CHECKING:
    from nf.text.chat_template import ChatTemplate
    from nf.text.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """Keyword arguments of LLM and AsyncLLM: EngineConfig's fields, and how text is handled."""

    tokenizer: str | os.PathLike[str] | None
    chat_template: str | None
    skip_tokenizer_init: bool
    dtype: DType
    seed: int
    max_model_len: int | None
    gpu_memory_utilization: float
    tensor_parallel_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int | None
    num_host_pages: int | None
    preemption: Preemption
    device: Device
    plan: str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model ready to run: what an engine is made of.

    Args:
        config: how it is run, with nothing left to "auto" or None.
        model_config: shape of the model.
        tokenizer: None if only token ids are taken.
    """

    config: EngineConfig
    model_config: ModelConfig
    scheduler: Scheduler
    executor: Executor
    inputs: Inputs
    tokenizer: Tokenizer | None


def load(model: str | os.PathLike[str], **options: Unpack[Options]) -> Loaded:
    """Load a model. Options and small files are checked first, weights are read last.

    Raises:
        InputError: an option is unknown or not acceptable.
        ModelError: the model cannot be used.
        PlanError: the pipeline plan does not suit the model.
    """
    config, text_options = _read_options(options)
    model_dir = _resolve_name("model", model)
    model_config = read_config(model_dir)
    declared = declare(model_config)
    tokenizer, chat_template = _load_text(model_dir, **text_options)
    plan = _load_plan(config, declared, "max_num_batched_tokens" in options)
    if "max_num_seqs" not in options:  # every decoding sequence needs a row of the dense batch
        config = replace(config, max_num_seqs=min(config.max_num_seqs, plan.dense_batch_size))
    _check_memory(model_dir, declared)
    config = _resolve(config, declared, plan)
    defaults = SamplingParams(**read_sampling_defaults(model_dir))
    assert config.max_model_len is not None
    inputs = Inputs(
        Limits(model_config.vocab_size, config.max_model_len, config.max_num_seqs, tokenizer is not None),
        tokenizer=tokenizer,
        chat_template=chat_template,
        eos_token_ids=model_config.eos_token_ids,
        default_params=defaults,
        seed=config.seed,
    )
    scheduler = Scheduler(_scheduler_config(config, declared))
    weights = load_weights(declared, model_dir, np.dtype(_DTYPES[config.dtype]))
    executor = CpuExecutor(declared, weights, plan, **_sizes(config))
    return Loaded(config, model_config, scheduler, executor, inputs, tokenizer)


_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _read_options(options: Options) -> tuple[EngineConfig, dict[str, Any]]:
    """EngineConfig of the options that it knows, and the ones about text; every value is in its range."""
    known = {field.name for field in fields(EngineConfig)}
    for name in options:
        if name not in known | _TEXT_OPTIONS:
            near = " or ".join(difflib.get_close_matches(name, sorted(known | _TEXT_OPTIONS), n=3))
            raise InputError(name, f"is not an option{f'; did you mean {near}?' if near else ''}")
    given: dict[str, Any] = {name: value for name, value in options.items() if name in known}
    if isinstance(given.get("plan"), os.PathLike):
        given["plan"] = os.fspath(given["plan"])
    config = EngineConfig(**given)
    _check(config)
    return config, {name: value for name, value in options.items() if name in _TEXT_OPTIONS}


_TEXT_OPTIONS = frozenset({"tokenizer", "chat_template", "skip_tokenizer_init"})


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
    if config.device == "cuda":
        raise InputError("device", "this build of nf has only the CPU executor; use 'cpu' or 'auto'")
    if config.tensor_parallel_size != 1:
        raise InputError("tensor_parallel_size", f"must be 1 on the CPU, not {config.tensor_parallel_size}")


_MOST = 2**31 - 1  # steps are described by int32 arrays
_INTEGERS = (
    ("seed", 0, 2**64 - 1, False),
    ("max_model_len", 1, _MOST, True),
    ("tensor_parallel_size", 1, _MOST, False),
    ("max_num_seqs", 1, _MOST, False),
    ("max_num_batched_tokens", 1, _MOST, False),
    ("page_size", 1, _MOST, False),
    ("num_pages", 1, _MOST, True),
    ("num_host_pages", 0, _MOST, True),
)  # field, least and greatest value, whether None is a value


def _load_text(
    model_dir: Path,
    tokenizer: str | os.PathLike[str] | None = None,
    chat_template: str | None = None,
    skip_tokenizer_init: bool = False,
) -> tuple[Tokenizer | None, ChatTemplate | None]:
    if not isinstance(skip_tokenizer_init, bool):
        raise InputError("skip_tokenizer_init", f"must be true or false, not {shown(skip_tokenizer_init)}")
    if skip_tokenizer_init:
        if tokenizer is not None or chat_template is not None:
            name = "tokenizer" if tokenizer is not None else "chat_template"
            raise InputError(name, "cannot be used together with skip_tokenizer_init=True")
        return None, None
    from nf.text.tokenizer import Tokenizer

    loaded = Tokenizer.from_dir(model_dir if tokenizer is None else _resolve_name("tokenizer", tokenizer))
    if chat_template is None:
        return loaded, loaded.chat_template
    return loaded, loaded.make_chat_template(chat_template)


def _resolve_name(field: str, name: str | os.PathLike[str]) -> Path:
    """The directory of a model or a tokenizer."""
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise InputError(field, f"must be a directory, a bundled model's name or a hub name, not {shown(name)}")
    return resolve_model(os.fspath(name))


def _load_plan(config: EngineConfig, model: Model, size_is_given: bool) -> PipelinePlan:
    """The plan; one from a file decides the dense batch size, unless the user does too."""
    name = "sequential" if config.plan is None else config.plan
    size = config.max_num_batched_tokens if size_is_given or name in BUILT_IN else None
    try:
        return load_plan(name, model.operations, size)
    except PlanError as error:
        if error.field != "dense_batch_size":
            raise
        sentence = str(error).removeprefix("dense_batch_size: ")
        raise InputError("max_num_batched_tokens", sentence) from error


def _resolve(config: EngineConfig, model: Model, plan: PipelinePlan) -> EngineConfig:
    """The configuration with every "auto" and None decided."""
    config = replace(
        config,
        device="cpu",
        dtype="float32" if config.dtype == "auto" else config.dtype,
        plan=plan.name,
        max_num_batched_tokens=plan.dense_batch_size,
        max_model_len=_max_model_len(config.max_model_len, model.config),
    )
    num_pages, num_host_pages = pool_sizes(config, model)
    return replace(config, num_pages=num_pages, num_host_pages=num_host_pages)


def _max_model_len(asked: int | None, model: ModelConfig) -> int:
    most = model.max_position_embeddings
    if asked is not None and asked > most:
        raise InputError("max_model_len", f"{asked} is more than {most}, the model's max_position_embeddings")
    return most if asked is None else asked


def _sizes(config: EngineConfig) -> dict[str, Any]:
    """What scheduler and executor must agree on."""
    return {
        "page_size": config.page_size,
        "num_pages": config.num_pages,
        "num_host_pages": config.num_host_pages,
        "max_num_seqs": config.max_num_seqs,
        "max_model_len": config.max_model_len,
    }


def _scheduler_config(config: EngineConfig, model: Model) -> SchedulerConfig:
    return SchedulerConfig(
        **_sizes(config),
        dense_batch_size=config.max_num_batched_tokens,
        swap_cost_per_page=2.0 * config.page_size * kv_bytes_per_token(model.config),  # out and in again
        recompute_cost_per_token=recompute_bytes_per_token(model, config.max_num_batched_tokens),
        preemption=config.preemption,
    )


def _check_memory(model_dir: Path, model: Model) -> None:
    needed, free = weight_bytes(model), free_ram()
    if needed > free:
        raise ModelError(
            str(model_dir),
            f"its weights need {mebibytes(needed)} in float32, and {mebibytes(free)} are free",
        )
