"""The pipeline plan: data that says in which order and where the nano-operations of a model run.

This is the module to import. The parts: the data and its JSON form (pipeline_plan.py), what waits for what
(dependencies.py), whether it fits (validation.py), the order over all layers (unroll.py) and the plans that need no
measurement (builtin.py). All of it is pure Python.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from nf.errors import PlanError
from nf.graphs.builtin import BUILT_IN, nano_batch_plan, sequential_plan
from nf.graphs.pipeline_plan import NanoOperation, PipelinePlan, Stream
from nf.graphs.unroll import LayerStep, cross_stream_waits, layers_to_prove, unroll
from nf.graphs.validation import check_parts
from nf.models.operations import Operation

__all__ = [
    "BUILT_IN",
    "LayerStep",
    "NanoOperation",
    "PipelinePlan",
    "Stream",
    "cross_stream_waits",
    "load_plan",
    "nano_batch_plan",
    "sequential_plan",
    "unroll",
    "validate",
]

MAX_FILE_BYTES = 1 << 20


def validate(plan: PipelinePlan, operations: Sequence[Operation], *, gpu_sms: int | None = None) -> None:
    """Check that a plan runs every operation on every token exactly once and never deadlocks, for any number of layers.

    Args:
        plan: to be checked.
        operations: of one layer of the model, in logical order.
        gpu_sms: SMs of the GPU; None leaves out whether the partitions fit.

    Raises:
        PlanError: one sentence about the first thing that is wrong.
    """
    check_parts(plan, operations, gpu_sms=gpu_sms)
    unroll(plan, operations, layers_to_prove(plan))


def load_plan(
    name_or_path: str | os.PathLike[str],
    operations: Sequence[Operation],
    dense_batch_size: int | None = None,
    *,
    gpu_sms: int | None = None,
) -> PipelinePlan:
    """A valid plan for ``operations``: a built-in one, made for them, or one read from a JSON file.

    Args:
        name_or_path: "sequential", "nano-batch" or the path of a JSON file.
        operations: of one layer of the model, in logical order.
        dense_batch_size: B_dense in tokens. A built-in plan needs it; a file must have been made for it, and None takes
            the file's own.
        gpu_sms: SMs of the GPU; None leaves out whether the partitions fit.

    Raises:
        PlanError: no such plan, the file cannot be read, or the plan is not valid; the message names the file.
    """
    name = os.fspath(name_or_path)
    if name in BUILT_IN:
        if dense_batch_size is None:
            raise PlanError("dense_batch_size", f'must be given for the built-in plan "{name}"')
        plan = BUILT_IN[name](operations, dense_batch_size)
        validate(plan, operations, gpu_sms=gpu_sms)
        return plan
    text = _read(name)
    try:
        plan = PipelinePlan.from_json(text)
        if dense_batch_size is not None and plan.dense_batch_size != dense_batch_size:
            raise PlanError(
                "dense_batch_size",
                f"the plan is made for {plan.dense_batch_size} tokens, but {dense_batch_size} are asked for",
            )
        validate(plan, operations, gpu_sms=gpu_sms)
    except PlanError as error:
        raise PlanError(name, str(error)) from None
    return plan


def _read(name: str) -> str:
    try:
        with open(name, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise PlanError(name or "plan", f"is neither a file nor a built-in plan ({', '.join(BUILT_IN)})") from None
    except OSError as error:
        raise PlanError(name, f"cannot be read ({error.strerror})") from None
    except ValueError as error:  # no operating system has such a path
        raise PlanError(name, f"cannot be read ({error})") from None
    if len(data) > MAX_FILE_BYTES:
        raise PlanError(name, f"is larger than a plan can be ({MAX_FILE_BYTES >> 20} MiB)")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise PlanError(name, "is not UTF-8 text; a plan is a JSON file") from None
