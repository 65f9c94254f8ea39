"""From a model's name and the user's options to everything an engine needs; what can be wrong is found before work."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from nf.backends import Backend, CpuBackend, GpuBackend, Startup, sizes, timed
from nf.config import EngineConfig, ModelConfig
from nf.device_choice import choose_device
from nf.engine_options import Options, TextOptions, read_options
from nf.errors import InputError, ModelError, PlanError, shown
from nf.executors.base import Executor
from nf.graphs.plan import BUILT_IN, PipelinePlan, load_plan
from nf.hub import BUNDLED_MODEL, resolve_model
from nf.inputs import Inputs
from nf.limits import Limits
from nf.models.declaration import Model
from nf.models.hf_config import read_config, read_sampling_defaults
from nf.models.registry import declare
from nf.models.shapes import SHAPES, shape
from nf.sampling_params import SamplingParams
from nf.scheduler.scheduler import Scheduler, SchedulerConfig

if TYPE_CHECKING:
    from nf.text.chat_template import ChatTemplate
    from nf.text.tokenizer import Tokenizer

__all__ = ["Loaded", "Options", "load"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model ready to run: what an engine is made of.

    Args:
        config: how it is run, with nothing left to "auto" or None.
        model_config: shape of the model.
        tokenizer: None if only token ids are taken.
        device_reason: why it runs on the device that it runs on, a sentence.
        startup: seconds that the parts of loading took: "text", "device", "weights", "executor", and on a GPU "kernels"
            (those that had to be compiled) and "capture".
    """

    config: EngineConfig
    model_config: ModelConfig
    scheduler: Scheduler
    executor: Executor
    inputs: Inputs
    tokenizer: Tokenizer | None
    device_reason: str = ""
    startup: Startup = field(default_factory=dict)


def load(model: str | os.PathLike[str], **options: Unpack[Options]) -> Loaded:
    """Load a model. Options and small files are checked first, weights are read last.

    Raises:
        InputError: an option is unknown or not acceptable.
        ModelError: the model cannot be used.
        PlanError: the pipeline plan does not suit the model.
        CompileError: a kernel has to be compiled and cannot be.
        DeviceMemoryError: the GPU has not enough memory free.
    """
    startup: Startup = {}
    config, text_options = read_options(options)
    config_only = config.random_weights and text_options.get("skip_tokenizer_init") is True
    model_dir, model_config = _find_model(model, config, config_only)
    declared = declare(model_config)
    with timed(startup, "text"):
        tokenizer, chat_template = _load_text(model_dir, text_options)
    plans = [_load_plan(config, declared, "max_num_batched_tokens" in options)]
    with timed(startup, "device"):
        choice = choose_device(config.device, declared)
        level = logging.WARNING if choice.leaves_gpu else logging.INFO
        logger.log(level, "runs on %s: %s", choice.name, choice.reason)
        assert (choice.name == "cuda") == (choice.kernels is not None)
        backend: Backend = GpuBackend(choice.kernels) if choice.kernels is not None else CpuBackend()
        if config.plan is None:
            plans += backend.stored_plans(declared, plans[0].dense_batch_size)
        config = _resolve(config, declared, plans, backend, os.fspath(model_dir or model))
    assert config.max_model_len is not None
    assert config.max_num_seqs is not None
    inputs = Inputs(
        Limits(model_config.vocab_size, config.max_model_len, config.max_num_seqs, tokenizer is not None),
        tokenizer=tokenizer,
        chat_template=chat_template,
        eos_token_ids=model_config.eos_token_ids,
        default_params=SamplingParams(**read_sampling_defaults(model_dir)) if model_dir else SamplingParams(),
        seed=config.seed,
    )
    scheduler = Scheduler(_scheduler_config(config, declared, backend))
    executor = backend.start(config, declared, plans, None if config.random_weights else model_dir, startup)
    return Loaded(config, model_config, scheduler, executor, inputs, tokenizer, choice.reason, startup)


def _find_model(
    model: str | os.PathLike[str], config: EngineConfig, config_only: bool
) -> tuple[Path | None, ModelConfig]:
    """The model's directory, None if it is a shape alone, and its shape.

    Args:
        config_only: neither weights nor a tokenizer will be read.
    """
    if config.random_weights and isinstance(model, str) and not os.path.isdir(os.path.expanduser(model)):
        if model in SHAPES:
            return None, shape(model)
        if "/" not in model and model != BUNDLED_MODEL:
            raise ModelError(
                model or "model",
                f"with random weights a model is a directory, a hub name or one of {', '.join(SHAPES)}",
            )
    model_dir = _resolve_name("model", model, config_only)
    return model_dir, read_config(model_dir)


def _load_text(model_dir: Path | None, options: TextOptions) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """Tokenizer and chat template; a shape alone has neither, unless a tokenizer is named."""
    tokenizer, chat_template = options.get("tokenizer"), options.get("chat_template")
    skip = options.get("skip_tokenizer_init", False)
    if not isinstance(skip, bool):
        raise InputError("skip_tokenizer_init", f"must be true or false, not {shown(skip)}")
    if skip or (model_dir is None and tokenizer is None):
        for name, given in (("tokenizer", tokenizer), ("chat_template", chat_template)):
            if given is not None:
                why = "skip_tokenizer_init=True" if skip else "a shape alone; name a tokenizer"
                raise InputError(name, f"cannot be used together with {why}")
        return None, None
    from nf.text.tokenizer import Tokenizer

    named = model_dir if tokenizer is None else _resolve_name("tokenizer", tokenizer)
    assert named is not None
    loaded = Tokenizer.from_dir(named)
    if chat_template is None:
        return loaded, loaded.chat_template
    return loaded, loaded.make_chat_template(chat_template)


def _resolve_name(field: str, name: str | os.PathLike[str], config_only: bool = False) -> Path:
    """The directory of a model or a tokenizer."""
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise InputError(field, f"must be a directory, a bundled model's name or a hub name, not {shown(name)}")
    return resolve_model(os.fspath(name), config_only=config_only)


def _load_plan(config: EngineConfig, model: Model, size_is_given: bool) -> PipelinePlan:
    """The plan, the sequential one if none is named; a file decides the batch size, unless the user does too."""
    name = "sequential" if config.plan is None else config.plan
    size = config.max_num_batched_tokens if size_is_given or name in BUILT_IN else None
    try:
        return load_plan(name, model.operations, size)
    except PlanError as error:
        if error.field != "dense_batch_size":
            raise
        sentence = str(error).removeprefix("dense_batch_size: ")
        raise InputError("max_num_batched_tokens", sentence) from error


def _resolve(
    config: EngineConfig, model: Model, plans: Sequence[PipelinePlan], backend: Backend, name: str
) -> EngineConfig:
    """The configuration with every "auto" and None decided."""
    dense_batch_size = plans[0].dense_batch_size
    max_num_seqs = config.max_num_seqs
    if max_num_seqs is None:  # every decoding sequence needs a row of the dense batch
        max_num_seqs = min(backend.max_num_seqs, dense_batch_size)
    config = replace(
        config,
        plan="; ".join(dict.fromkeys(plan.name for plan in plans)),
        max_num_batched_tokens=dense_batch_size,
        max_num_seqs=max_num_seqs,
        max_model_len=_max_model_len(config.max_model_len, model.config),
    )
    return backend.resolve(config, model, plans, name)


def _max_model_len(asked: int | None, model: ModelConfig) -> int:
    most = model.max_position_embeddings
    if asked is not None and asked > most:
        raise InputError("max_model_len", f"{asked} is more than {most}, the model's max_position_embeddings")
    return most if asked is None else asked


def _scheduler_config(config: EngineConfig, model: Model, backend: Backend) -> SchedulerConfig:
    swap, recompute = backend.preemption_costs(config, model)
    return SchedulerConfig(
        **sizes(config),
        dense_batch_size=config.max_num_batched_tokens,
        swap_cost_per_page=swap,
        recompute_cost_per_token=recompute,
        preemption=config.preemption,
    )
