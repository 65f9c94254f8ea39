"""Whether the parts of a plan fit the operations it should run and the GPU it should run on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nf.errors import PlanError
from nf.graphs.pipeline_plan import PipelinePlan
from nf.models.operations import Operation

MAX_DENSE_BATCH_SIZE = 1 << 20
MAX_NANO_BATCHES = 64  # the bounds keep a plan that someone else wrote from taking more than seconds to check
MAX_STREAMS = 16
MAX_LOADS = 4096
MAX_KEYS = 1 << 30  # that a decode token sees
MAX_LAG = 16
MAX_PRIORITY = 16  # either way; a driver clamps it to the few it has


def check_parts(plan: PipelinePlan, operations: Sequence[Operation], *, gpu_sms: int | None = None) -> None:
    """Everything ``validate`` promises but the order of the streams.

    Raises:
        PlanError: names the first part that is wrong.
    """
    _check_nano_batches(plan)
    _check_streams(plan, gpu_sms)
    _check_nano_operations(plan, {operation.name for operation in operations})
    for operation in operations:
        _check_coverage(plan, operation.name)
    _check_all_used(plan)


def _check_nano_batches(plan: PipelinePlan) -> None:
    tokens = plan.dense_batch_size
    if not 1 <= tokens <= MAX_DENSE_BATCH_SIZE:
        raise PlanError("dense_batch_size", f"must be 1 to {MAX_DENSE_BATCH_SIZE} tokens, got {tokens}")
    if len(plan.loads) > MAX_LOADS:
        raise PlanError("loads", f"must be at most {MAX_LOADS}, got {len(plan.loads)}")
    for index, (decode_tokens, keys) in enumerate(plan.loads):
        if not 1 <= decode_tokens <= tokens or not 1 <= keys <= MAX_KEYS:
            raise PlanError(
                f"loads[{index}]",
                f"must be 1 to {tokens} decode tokens, the dense batch size, and 1 to {MAX_KEYS} keys, "
                f"got [{decode_tokens}, {keys}]",
            )
    if not 1 <= len(plan.nano_batches) <= MAX_NANO_BATCHES:
        raise PlanError("nano_batches", f"must be 1 to {MAX_NANO_BATCHES} token ranges, got {len(plan.nano_batches)}")
    for index, (start, stop) in enumerate(plan.nano_batches):
        if not 0 <= start < stop <= tokens:
            raise PlanError(
                f"nano_batches[{index}]",
                f"[{start}, {stop}) is not a range of at least one token within the dense batch [0, {tokens})",
            )


def _check_streams(plan: PipelinePlan, gpu_sms: int | None) -> None:
    if not 1 <= len(plan.streams) <= MAX_STREAMS:
        raise PlanError("streams", f"must be 1 to {MAX_STREAMS} streams, got {len(plan.streams)}")
    names: set[str] = set()
    for index, stream in enumerate(plan.streams):
        if not stream.name:
            raise PlanError(f"streams[{index}].name", "must not be empty")
        if stream.name in names:
            raise PlanError(f"streams[{index}].name", f'"{stream.name}" names two streams; each needs its own name')
        names.add(stream.name)
        if not stream.nano_operations:
            raise PlanError(f"streams[{index}].nano_operations", "must hold at least one nano-operation")
        if not -MAX_PRIORITY <= stream.priority <= MAX_PRIORITY:
            raise PlanError(
                f"streams[{index}].priority", f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}, got {stream.priority}"
            )
        if stream.sms != "all" and stream.sms < 1:
            raise PlanError(f"streams[{index}].sms", f'must be at least 1 SM or "all", got {stream.sms}')
        if stream.sms != "all" and gpu_sms is not None and stream.sms > gpu_sms:
            raise PlanError(f"streams[{index}].sms", f"asks for {stream.sms} SMs of a GPU that has {gpu_sms}")
    # Numbered streams are disjoint partitions, held all the time; an "all" stream shares the SMs with every other.
    partitioned = sum(stream.sms for stream in plan.streams if stream.sms != "all")
    if gpu_sms is not None and partitioned > gpu_sms:
        raise PlanError("streams", f"their partitions ask for {partitioned} SMs together, but the GPU has {gpu_sms}")


def _check_nano_operations(plan: PipelinePlan, known: set[str]) -> None:
    seen: set[tuple[str, int]] = set()
    for s, stream in enumerate(plan.streams):
        for i, item in enumerate(stream.nano_operations):
            path = f"streams[{s}].nano_operations[{i}]"
            if item.operation not in known:
                raise PlanError(
                    f"{path}.operation",
                    f'"{item.operation}" is not an operation of the model; it has {", ".join(sorted(known))}',
                )
            if not 0 <= item.nano_batch < len(plan.nano_batches):
                raise PlanError(
                    f"{path}.nano_batch",
                    f"must be the index of one of the {len(plan.nano_batches)} nano-batches, got {item.nano_batch}",
                )
            if not 0 <= item.lag <= MAX_LAG:
                raise PlanError(f"{path}.lag", f"must be 0 to {MAX_LAG} rounds, got {item.lag}")
            if (item.operation, item.nano_batch) in seen:
                raise PlanError(path, f"{item.operation} of nano-batch {item.nano_batch} is in the plan twice")
            seen.add((item.operation, item.nano_batch))


def _check_coverage(plan: PipelinePlan, operation: str) -> None:
    """The nano-batches of one operation must follow one another from the first token to the last."""
    used = [
        item.nano_batch for stream in plan.streams for item in stream.nano_operations if item.operation == operation
    ]
    if not used:
        raise PlanError("streams", f"{operation} is in no stream; every operation of the model must run")
    reached = 0
    for start, stop in (*sorted(plan.nano_batches[index] for index in used), (plan.dense_batch_size,) * 2):
        if start > reached:
            raise PlanError("streams", f"no nano-operation of {operation} covers tokens [{reached}, {start})")
        if start < reached:
            raise PlanError(
                "streams", f"two nano-operations of {operation} cover tokens [{start}, {min(stop, reached)})"
            )
        reached = stop


def _check_all_used(plan: PipelinePlan) -> None:
    uses = Counter(item.nano_batch for stream in plan.streams for item in stream.nano_operations)
    for index, (start, stop) in enumerate(plan.nano_batches):
        if not uses[index]:
            raise PlanError(f"nano_batches[{index}]", f"no nano-operation uses the tokens [{start}, {stop})")
