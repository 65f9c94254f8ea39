"""Plans by what they were measured for: a model's shape, a GPU, a dense batch size and loads.

Plans that ship lie in graphs/plans/, those that ``nf plan search`` found on this machine in the cache, and of one dense
batch size these replace the former. A plan is a file of its own, as ``PipelinePlan.to_json`` writes it, so it can be
shown, checked and passed to ``--plan`` like any other; what was measured of those of one size and of their rivals lies
beside them.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nf.config import ModelConfig
from nf.errors import PlanError
from nf.files import write_whole
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


def prefix(config: ModelConfig, gpu: str) -> str:
    """What the files of a model's shape on ``gpu`` (the driver's name) begin with; the dense batch size follows."""
    return f"{_plain(gpu)}/{_plain(shape_name(config))}-b"


def find_plans(
    model: Model, gpu: str, dense_batch_size: int, *, folder: Path | None = None, gpu_sms: int | None = None
) -> list[StoredPlan]:
    """The plans measured to be the fastest for steps of up to ``dense_batch_size`` tokens, in no particular order.

    A stored file that cannot be used is passed over, and the log says so: it was not the user who chose it.

    Args:
        folder: of the plans found on this machine; None is the usual one.
        gpu_sms: SMs of the GPU; None leaves out whether partitions fit.
    """
    found: dict[int, list[StoredPlan]] = {}
    for place in (BUILT_IN_FOLDER, folder or user_folder()):
        here: dict[int, list[StoredPlan]] = {}
        for path in _files(place, f"{prefix(model.config, gpu)}*"):
            try:
                plan = load_plan(path, model.operations, gpu_sms=gpu_sms)
            except PlanError as error:
                logger.warning("a stored plan is passed over: %s", error)
                continue
            if plan.dense_batch_size <= dense_batch_size:
                here.setdefault(plan.dense_batch_size, []).append(StoredPlan(plan, path))
        found |= here
    return [stored for plans in found.values() for stored in plans]


def save_plans(
    plans: Sequence[PipelinePlan],
    config: ModelConfig,
    gpu: str,
    measured: Mapping[str, Any],
    *,
    folder: Path | None = None,
) -> list[Path]:
    """Keep ``plans`` as those for their dense batch size, and no others; returns their files.

    Args:
        plans: of one dense batch size, each with its loads; the first of them names the file.
        measured: plain data, written beside them.
        folder: None is that of the plans found on this machine.
    """
    place, name = folder or user_folder(), f"{prefix(config, gpu)}{plans[0].dense_batch_size}"
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    files = {place / "{}-d{}x{}.json".format(name, *plan.loads[0]): plan for plan in plans}
    write_whole(place / f"{name}{MEASURED_SUFFIX}", json.dumps(measured, indent=1, allow_nan=False) + "\n")
    for path, plan in files.items():
        write_whole(path, plan.to_json())
    for path in {*_files(place, name), *_files(place, f"{name}-d*")} - files.keys():
        path.unlink(missing_ok=True)  # another search may have been faster
    return list(files)


def _files(place: Path, pattern: str) -> list[Path]:
    """Plan files of a folder; none where one may not look."""
    found = (place / name for name in glob.glob(f"{pattern}.json", root_dir=place))  # Path.glob raises there
    return sorted(path for path in found if not path.name.endswith(MEASURED_SUFFIX) and os.path.isfile(path))


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
