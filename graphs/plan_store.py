"""Plans by what they were measured for: a model's shape, a GPU and a dense batch size.

Plans that ship lie in graphs/plans/, those that ``nf plan search`` found on this machine in the cache, and these go
first. A plan is a file of its own, as ``PipelinePlan.to_json`` writes it, so it can be shown, checked and passed to
``--plan`` like any other; what was measured of it and of its rivals lies beside it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nf.config import ModelConfig
from nf.errors import PlanError
from nf.graphs.pipeline_plan import PipelinePlan
from nf.graphs.plan import load_plan
from nf.kernels.compile import cache_dir
from nf.models.declaration import Model

logger = logging.getLogger(__name__)

BUILT_IN_FOLDER = Path(__file__).resolve().parent / "plans"
MEASURED_SUFFIX = ".measured.json"


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """A plan and where it comes from."""

    plan: PipelinePlan
    path: Path


def user_folder() -> Path:
    """Where plans found on this machine are kept: beside the compiled kernels."""
    return cache_dir() / "plans"


def shape_name(config: ModelConfig) -> str:
    """What of a model decides how fast its operations are; alike for every checkpoint of that shape."""
    parts = [
        config.architecture.removesuffix("ForCausalLM"),
        f"{config.num_layers}l",
        f"h{config.hidden_size}",
        f"i{config.intermediate_size}",
        f"q{config.num_heads}",
        f"kv{config.num_kv_heads}",
        f"d{config.head_dim}",
        f"v{config.vocab_size}",
    ]
    if config.num_experts:
        parts.append(f"e{config.num_experts}x{config.experts_per_token}")
    if config.sliding_window:
        parts.append(f"w{config.sliding_window}")
    return "-".join(parts).lower()


def file_name(config: ModelConfig, gpu: str, dense_batch_size: int) -> str:
    """Of the plan for a model's shape on ``gpu`` (the driver's name) at ``dense_batch_size`` tokens."""
    return f"{_plain(gpu)}/{_plain(shape_name(config))}-b{dense_batch_size}.json"


def find_plan(
    model: Model, gpu: str, dense_batch_size: int, *, folder: Path | None = None, gpu_sms: int | None = None
) -> StoredPlan | None:
    """The plan measured to be the fastest, None if nothing was measured.

    A stored file that cannot be used is passed over, and the log says so: it was not the user who chose it.

    Args:
        folder: of the plans found on this machine; None is the usual one.
        gpu_sms: SMs of the GPU; None leaves out whether partitions fit.
    """
    name = file_name(model.config, gpu, dense_batch_size)
    for place in (folder or user_folder(), BUILT_IN_FOLDER):
        path = place / name
        if not os.path.isfile(path):  # unlike Path's, False also where it may not look
            continue
        try:
            return StoredPlan(load_plan(path, model.operations, dense_batch_size, gpu_sms=gpu_sms), path)
        except PlanError as error:
            logger.warning("a stored plan is passed over: %s", error)
    return None


def save_plan(
    plan: PipelinePlan, config: ModelConfig, gpu: str, measured: Mapping[str, Any], *, folder: Path | None = None
) -> Path:
    """Keep ``plan`` as the one for its dense batch size; returns its file.

    Args:
        measured: plain data, written beside it.
        folder: None is that of the plans found on this machine.
    """
    path = (folder or user_folder()) / file_name(config, gpu, plan.dense_batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path.with_name(path.stem + MEASURED_SUFFIX), json.dumps(measured, indent=1, allow_nan=False) + "\n")
    _write(path, plan.to_json())
    return path


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
