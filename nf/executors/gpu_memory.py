"""What a GPU executor keeps in device memory for its steps: how much that is, and all of it allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from nf.config import ModelConfig
from nf.executors.gpu_buffers import Buffers, Sizes, buffer_layout
from nf.executors.gpu_inputs import StepInputs
from nf.executors.gpu_kernels import LayerKernels
from nf.executors.gpu_outputs import StepOutputs
from nf.executors.gpu_pages import KvPages
from nf.executors.gpu_weights import DeviceWeights
from nf.executors.rope import rotary_table
from nf.graphs.plan import PipelinePlan
from nf.graphs.pool import step_plans
from nf.kernels.device import DeviceMemory
from nf.kernels.rope_append import rotary_pairs
from nf.models.declaration import Model

RESERVED_BYTES = 1 << 30  # of device memory: loaded kernels, graphs, the context, what allocations are rounded up to


@dataclass(frozen=True, slots=True)
class Memory:
    """Where everything lies on the device."""

    weights: DeviceWeights
    buffers: Buffers
    inputs: StepInputs
    outputs: StepOutputs
    kv: int  # page 0 of layer 0
    kv_layer_bytes: int  # from a layer's page 0 to the next layer's
    sampler_workspace: int


def step_memory(
    config: ModelConfig,
    plans: Sequence[PipelinePlan],
    sizes: Sizes,
    kernels: LayerKernels,
    weights: DeviceWeights,
    pages: KvPages,
    undo: ExitStack,
    *,
    num_host_pages: int = 0,
    sms: int,
) -> Memory:
    """Buffers, inputs and outputs of a step that any of ``plans`` runs, beside weights and pages.

    Args:
        undo: frees what is allocated here; weights and pages stay their owner's.
        sms: of the GPU.

    Raises:
        DeviceMemoryError: the GPU has not enough memory free; ``undo`` frees what was allocated until then.
    """
    buffers = Buffers(buffer_layout(config, sizes, plans, sms))
    undo.callback(buffers.free)
    inputs = StepInputs(
        dense_batch_size=sizes.dense_batch_size,
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        page_size=sizes.page_size,
        num_host_pages=num_host_pages,
        ranges=[part for plan in plans for part in plan.nano_batches],
    )
    undo.callback(inputs.free)
    outputs = StepOutputs(
        max_num_seqs=sizes.max_num_seqs, dense_batch_size=sizes.dense_batch_size, vocab_size=config.vocab_size
    )
    undo.callback(outputs.free)
    sampler = DeviceMemory(kernels.sampler.workspace_bytes, "workspaces of sampling").zero()
    undo.callback(sampler.free)
    rotary = rotary_pairs(*rotary_table(config.rope, config.head_dim, sizes.tokens_stride))
    buffers.memory.upload(rotary, buffers.offsets["rotary"])
    return Memory(weights, buffers, inputs, outputs, pages.pointer, pages.layer_bytes, sampler.pointer)


def workspace_bytes(
    model: Model, plans: Sequence[PipelinePlan], *, max_num_seqs: int, max_model_len: int, page_size: int, sms: int
) -> int:
    """Device memory that an executor of ``plans`` takes beside weights and KV pages, a little more rather than less."""
    sizes = Sizes(plans[0].dense_batch_size, max_num_seqs, max_model_len, page_size)
    captured = [step.plan for step in step_plans(plans, model.operations)]
    buffers = buffer_layout(model.config, sizes, captured, sms).num_bytes
    edited_rows = 2 * sms * model.config.vocab_size * 4  # of sampling
    pages = max_num_seqs * -(-max_model_len // page_size)
    inputs = 4 * pages + max_num_seqs * (64 << 10)
    return buffers + edited_rows + inputs + RESERVED_BYTES
