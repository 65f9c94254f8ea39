"""Plans close to one that won: what Stages I and II, which know the GPU by interpolation, may have missed by a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nf.graphs.pipeline_plan import PipelinePlan
from nf.planning.nano_layer import COMPUTE
from nf.planning.profile import SM_STEP
from nf.planning.resources import cuts_in_words

CUT_STEP = 256  # tokens; by one tile of 128 both nano-batches would have an odd number of them, which runs slower


def neighbours(plan: PipelinePlan) -> Iterator[PipelinePlan]:
    """Other partitions, then other cuts, a step to either side; none but for two nano-batches on two partitions."""
    sms = {stream.name: stream.sms for stream in plan.streams if stream.sms != "all"}
    compute = sms.pop(COMPUTE, None)
    cut = plan.nano_batches[0][1]
    if compute is None or len(sms) != 1 or len(plan.streams) != 2:
        return
    if plan.nano_batches != ((0, cut), (cut, plan.dense_batch_size)):
        return
    (memory,) = sms.values()
    for more in (-SM_STEP, SM_STEP):
        if memory + more >= SM_STEP and compute - more >= SM_STEP:
            yield _varied(plan, compute - more, memory + more, cut)
    for other in (cut - CUT_STEP, cut + CUT_STEP):
        if 0 < other < plan.dense_batch_size:
            yield _varied(plan, compute, memory, other)


def _varied(plan: PipelinePlan, compute: int, memory: int, cut: int) -> PipelinePlan:
    varied = replace(
        plan,
        nano_batches=((0, cut), (cut, plan.dense_batch_size)),
        streams=tuple(replace(s, sms=compute if s.name == COMPUTE else memory) for s in plan.streams),
    )
    return replace(varied, name=f"{memory} SMs for memory, {cuts_in_words(varied)}")
