"""The operations of a layer, and what comes before and after the layers, as launches of kernels.

Everything a step varies in is read on the device from its inputs (gpu_inputs.py), so the same launches, captured once,
serve every step. Queries are rotated in place, in the qkv buffer; residuals are added by the epilogues of GEMMs.

A kernel may be launched before those it depends on have ended (``pdl``): what it reads before it waits for them —
weights, inputs of the step, the list of what is to be merged — was written before they began. GEMMs are always launched
so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nf.executors.gpu_buffers import BF16, COUNT_STRIDE, Range, Sizes, moe_ranges, moe_shape, ranges_of
from nf.executors.gpu_kernels import LayerKernels
from nf.executors.gpu_memory import Memory
from nf.graphs.partition import Lane
from nf.graphs.plan import LayerStep, PipelinePlan
from nf.kernels.gemm import Epilogue, Gemm, GemmChoice, Output, choose
from nf.kernels.moe import TILE_ROWS
from nf.models.declaration import Model


class Layers:
    """Launches for one plan; a method per operation, found by the operation's name.

    Args:
        model: what to run.
        plan: gives the ranges, by which plans of attention and buffers of experts are told apart.
        kernels, memory: shared with other plans.
        sizes: of a step.
        sms: of the GPU.
    """

    def __init__(
        self, model: Model, plan: PipelinePlan, kernels: LayerKernels, memory: Memory, sizes: Sizes, sms: int
    ) -> None:
        self._config = model.config
        self._kernels = kernels
        self._memory = memory
        self._sizes = sizes
        self._sms = sms
        self._capacity = plan.dense_batch_size
        self._decode_ranges = _index(ranges_of(plan, "decode_attention"))
        self._prefill_ranges = _index(ranges_of(plan, "prefill_attention"))
        self._moe_ranges = moe_ranges(plan, moe_shape(model.config)) if model.config.num_experts else {}
        self._decode_sms = _sms_of(plan, "decode_attention", sms)
        self._gemms: dict[tuple[str, int, int], Gemm] = {}

    def launch(self, step: LayerStep, lane: Lane, pdl: bool) -> None:
        """Launch one nano-operation of one layer."""
        OPERATIONS[step.operation.name](self, step, lane, pdl)

    def begin(self, stream: int) -> None:
        """Token ids → hidden states; what the layers share: rows of the cache, plans of attention."""
        kernels, buffers, inputs = self._kernels, self._memory.buffers, self._memory.inputs.pointers
        kernels.embed.launch(
            table=self._memory.weights.embed,
            hidden=buffers["hidden"],
            tokens=buffers["tokens"],
            token_ids=inputs["token_ids"],
            token_slots=inputs["token_slots"],
            positions=inputs["positions"],
            count=inputs["num_tokens"],
            start=0,
            stop=self._capacity,
            sms=self._sms,
            stream=stream,
        )
        kernels.forks.launch(
            tokens=buffers["tokens"], forks=inputs["forks"], count=inputs["num_forks"], sms=self._sms, stream=stream,
            pdl=True,
        )  # fmt: skip
        kernels.kv_rows.launch(
            rows=buffers["kv_rows"],
            positions=inputs["positions"],
            qo_indptr=inputs["qo_indptr"],
            kv_indptr=inputs["kv_indptr"],
            kv_indices=inputs["kv_indices"],
            num_tokens=inputs["num_tokens"],
            num_seqs=inputs["num_seqs"],
            max_tokens=self._capacity,
            stream=stream,
            pdl=True,
        )
        for (start, stop), index in self._decode_ranges.items():
            kernels.decode_attention.plan(
                kv_lens=inputs["kv_lens"],
                kv_indptr=inputs["kv_indptr"],
                num_decode=inputs["num_decode"],
                workspace=buffers[f"decode_plan_{index}"],
                start=start,
                stop=stop,
                sms=self._decode_sms[start, stop],
                stream=stream,
            )
        for (start, stop), index in self._prefill_ranges.items():
            kernels.prefill_attention.plan(
                inputs["qo_indptr"],
                inputs["kv_lens"],
                inputs["kv_indptr"],
                inputs["num_decode"],
                inputs["num_seqs"],
                buffers[f"prefill_plan_{index}"],
                start=start,
                stop=stop,
                stream=stream,
            )

    def finish(self, stream: int) -> None:
        """Logits of the rows that are sampled, and a token for each."""
        self.sampled_logits(stream)
        self.sample(stream)

    def sampled_logits(self, stream: int) -> None:
        """Logits of the rows that are sampled."""
        inputs, seqs = self._memory.inputs.pointers, self._sizes.max_num_seqs
        self.logits(rows=inputs["sampling.rows"], count=inputs["num_samples"], capacity=seqs, stream=stream)

    def sample(self, stream: int) -> None:
        """A token for each row of logits."""
        inputs, outputs = self._memory.inputs, self._memory.outputs
        self._kernels.sampler.launch(
            logits=self._memory.buffers["logits"],
            stride=self._config.vocab_size,
            arrays=inputs.sampling,
            tokens=self._memory.buffers["tokens"],
            token_ids=outputs.token_ids,
            logprobs=outputs.logprobs,
            workspace=self._memory.sampler_workspace,
            capacity=self._sizes.max_num_seqs,
            stream=stream,
            pdl=True,
        )

    def logits(self, *, rows: int, count: int, capacity: int, stream: int, pdl: bool = True) -> None:
        """Fill the logits of the hidden states of ``rows``, a device pointer; ``count`` points to how many there are,
        at most ``capacity``."""
        config, buffers = self._config, self._memory.buffers
        self._kernels.gather_norm.launch(
            hidden=buffers["hidden"], weight=self._memory.weights.final_norm, normed=buffers["logit_rows"], rows=rows,
            count=count, start=0, stop=capacity, sms=self._sms, stream=stream, pdl=pdl,
        )  # fmt: skip
        gemm = self._gemm("lm_head", config.vocab_size, config.hidden_size, capacity, self._sms, output="float32")
        gemm.launch(
            x=buffers["logit_rows"],
            w=self._memory.weights.lm_head,
            y=buffers["logits"],
            rows=count,
            stream=stream,
        )

    # ---- operations; each takes (step, lane, pdl) ----

    def _norm(self, step: LayerStep, lane: Lane, pdl: bool) -> None:
        buffers = self._memory.buffers
        self._kernels.norm.launch(
            hidden=buffers["hidden"], weight=self._weight(step, step.operation.name), normed=buffers["normed"],
            **self._rows(step, lane), pdl=pdl,
        )  # fmt: skip

    def _qkv_proj(self, step: LayerStep, lane: Lane, _pdl: bool) -> None:
        config = self._config
        epilogue: Epilogue = "bias" if config.qkv_bias else "none"
        extra = self._weight(step, "qkv_bias") if config.qkv_bias else 0
        self._product(step, lane, "normed", "qkv", config.qkv_size, config.hidden_size, epilogue, extra)

    def _rope_append(self, step: LayerStep, lane: Lane, pdl: bool) -> None:
        buffers, has_norms = self._memory.buffers, self._config.qk_norm
        self._kernels.rope_append.launch(
            qkv=buffers["qkv"],
            kv=self._kv(step),
            table=buffers["rotary"],
            rows=buffers["kv_rows"],
            positions=self._memory.inputs.pointers["positions"],
            q_norm=self._weight(step, "q_norm") if has_norms else 0,
            k_norm=self._weight(step, "k_norm") if has_norms else 0,
            **self._rows(step, lane),
            pdl=pdl,
        )

    def _decode_attention(self, step: LayerStep, lane: Lane, pdl: bool) -> None:
        buffers, inputs = self._memory.buffers, self._memory.inputs.pointers
        self._kernels.decode_attention.launch(
            q=buffers["qkv"],
            q_stride=self._config.qkv_size,
            kv=self._kv(step),
            out=buffers["attn"],
            kv_lens=inputs["kv_lens"],
            kv_indptr=inputs["kv_indptr"],
            kv_indices=inputs["kv_indices"],
            workspace=buffers[f"decode_plan_{self._decode_ranges[step.start, step.stop]}"],
            sms=lane.sms,
            stream=lane.stream,
            pdl=pdl,
        )

    def _prefill_attention(self, step: LayerStep, lane: Lane, pdl: bool) -> None:
        buffers = self._memory.buffers
        self._kernels.prefill_attention.launch(
            buffers["qkv"],
            self._kv(step),
            buffers["attn"],
            buffers[f"prefill_plan_{self._prefill_ranges[step.start, step.stop]}"],
            self._memory.inputs.pointers["kv_indices"],
            q_stride=self._config.qkv_size,
            sms=lane.sms,
            stream=lane.stream,
            pdl=pdl,
        )

    def _o_proj(self, step: LayerStep, lane: Lane, _pdl: bool) -> None:
        config = self._config
        self._product(step, lane, "attn", "hidden", config.hidden_size, config.num_heads * config.head_dim, "residual")

    def _gate_up_proj(self, step: LayerStep, lane: Lane, _pdl: bool) -> None:
        config = self._config
        columns = 2 * config.intermediate_size
        self._product(step, lane, "normed", "activated", columns, config.hidden_size, "swiglu")

    def _down_proj(self, step: LayerStep, lane: Lane, _pdl: bool) -> None:
        config = self._config
        self._product(step, lane, "activated", "hidden", config.hidden_size, config.intermediate_size, "residual")

    def _router(self, step: LayerStep, lane: Lane, pdl: bool) -> None:
        assert self._kernels.moe is not None
        buffers = self._memory.buffers
        self._kernels.moe.route(
            normed=buffers["normed"], weight=self._weight(step, "router"), experts=buffers["experts"],
            shares=buffers["shares"], num_tokens=self._memory.inputs.pointers["num_tokens"],
            start=step.start, stop=step.stop, stream=lane.stream, pdl=pdl,
        )  # fmt: skip

    def _moe_gate_up_proj(self, step: LayerStep, lane: Lane, pdl: bool) -> None:
        assert self._kernels.moe is not None
        config, buffers = self._config, self._memory.buffers
        own = self._moe_pointers(step)
        self._kernels.moe.permute(
            normed=buffers["normed"], experts=buffers["experts"], places=buffers["places"],
            permuted=own["permuted"], tile_experts=own["tile_experts"], num_rows=own["num_rows"],
            num_tokens=self._memory.inputs.pointers["num_tokens"], start=step.start, stop=step.stop,
            sms=lane.sms, stream=lane.stream, pdl=pdl,
        )  # fmt: skip
        gemm = self._gemm(
            step.operation.name, 2 * config.intermediate_size, config.hidden_size, own["max_rows"], lane.sms, "swiglu",
            num_experts=config.num_experts,
        )  # fmt: skip
        gemm.launch(
            x=own["permuted"], w=self._weight(step, "moe_gate_up_proj"), y=own["activated"], rows=own["num_rows"],
            tile_experts=own["tile_experts"], stream=lane.stream,
        )  # fmt: skip

    def _moe_down_proj(self, step: LayerStep, lane: Lane, _pdl: bool) -> None:
        assert self._kernels.moe is not None
        config, buffers = self._config, self._memory.buffers
        own = self._moe_pointers(step)
        gemm = self._gemm(
            step.operation.name, config.hidden_size, config.intermediate_size, own["max_rows"], lane.sms,
            num_experts=config.num_experts,
        )  # fmt: skip
        gemm.launch(
            x=own["activated"], w=self._weight(step, "moe_down_proj"), y=own["expert_down"], rows=own["num_rows"],
            tile_experts=own["tile_experts"], stream=lane.stream,
        )  # fmt: skip
        self._kernels.moe.combine(
            hidden=buffers["hidden"], down=own["expert_down"], places=buffers["places"], shares=buffers["shares"],
            num_tokens=self._memory.inputs.pointers["num_tokens"], start=step.start, stop=step.stop,
            sms=lane.sms, stream=lane.stream, pdl=True,
        )  # fmt: skip

    # ---- what they share ----

    def _product(
        self,
        step: LayerStep,
        lane: Lane,
        x: str,
        y: str,
        n: int,
        k: int,
        epilogue: Epilogue,
        extra: int = 0,
    ) -> None:
        """y = epilogue(x·Wᵀ) over the step's rows; "residual" adds y's own rows."""
        buffers, capacity = self._memory.buffers, step.stop - step.start
        gemm = self._gemm(step.operation.name, n, k, capacity, lane.sms, epilogue)
        columns = n // 2 if epilogue == "swiglu" else n
        target = buffers[y] + step.start * columns * BF16.itemsize
        gemm.launch(
            x=buffers[x] + step.start * k * BF16.itemsize,
            w=self._weight(step, step.operation.name),
            y=target,
            rows=self._memory.inputs.count(step.start, step.stop),
            extra=target if epilogue == "residual" else extra,
            stream=lane.stream,
        )

    def _gemm(
        self,
        name: str,
        n: int,
        k: int,
        capacity: int,
        sms: int,
        epilogue: Epilogue = "none",
        output: Output = "bfloat16",
        num_experts: int | None = None,
    ) -> Gemm:
        key = name, capacity, sms
        if key not in self._gemms:
            choice: GemmChoice | None = None
            if name == "lm_head":  # no more rows than the graph has tokens, but for n > 1
                choice = choose(n, k, min(capacity, self._capacity), sms, epilogue, output)
            self._gemms[key] = self._kernels.gemm.product(
                n, k, capacity, sms=sms, epilogue=epilogue, output=output, num_experts=num_experts, choice=choice
            )
        return self._gemms[key]

    def _rows(self, step: LayerStep, lane: Lane) -> dict[str, int]:
        """Arguments of kernels that take rows [start, stop) of the whole batch."""
        count = self._memory.inputs.pointers["num_tokens"]
        return {"count": count, "start": step.start, "stop": step.stop, "sms": lane.sms, "stream": lane.stream}

    def _weight(self, step: LayerStep, name: str) -> int:
        return self._memory.weights.layers[step.layer][name]

    def _kv(self, step: LayerStep) -> int:
        return self._memory.kv + step.layer * self._memory.kv_layer_bytes

    def _moe_pointers(self, step: LayerStep) -> dict[str, int]:
        """The expert buffers of the step's range, and the rows they have at most."""
        own, buffers, config = self._moe_ranges[step.start, step.stop], self._memory.buffers, self._config
        return {
            "permuted": buffers["permuted"] + own.first_row * config.hidden_size * BF16.itemsize,
            "activated": buffers["activated"] + own.first_row * config.intermediate_size * BF16.itemsize,
            "expert_down": buffers["expert_down"] + own.first_row * config.hidden_size * BF16.itemsize,
            "tile_experts": buffers["tile_experts"] + own.first_row // TILE_ROWS * 4,
            "num_rows": buffers["num_expert_rows"] + own.index * COUNT_STRIDE,
            "max_rows": own.max_rows,
        }


OPERATIONS: dict[str, Callable[[Layers, LayerStep, Lane, bool], None]] = {
    "attn_norm": Layers._norm,
    "qkv_proj": Layers._qkv_proj,
    "rope_append": Layers._rope_append,
    "decode_attention": Layers._decode_attention,
    "prefill_attention": Layers._prefill_attention,
    "o_proj": Layers._o_proj,
    "ffn_norm": Layers._norm,
    "gate_up_proj": Layers._gate_up_proj,
    "down_proj": Layers._down_proj,
    "router": Layers._router,
    "moe_gate_up_proj": Layers._moe_gate_up_proj,
    "moe_down_proj": Layers._moe_down_proj,
}
"""How each operation of a layer is launched."""


def _index(ranges: Sequence[Range]) -> dict[Range, int]:
    return {item: index for index, item in enumerate(ranges)}


def _sms_of(plan: PipelinePlan, operation: str, total: int) -> dict[Range, int]:
    """SMs that each nano-operation of an operation may use."""
    return {
        plan.nano_batches[item.nano_batch]: total if stream.sms == "all" else stream.sms
        for stream in plan.streams
        for item in stream.nano_operations
        if item.operation == operation
    }
