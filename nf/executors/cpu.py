"""CpuExecutor: runs a plan's nano-operations in NumPy. The reference for every other executor, and the default without
a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nf.errors import EngineError, ModelError
from nf.executors.base import StepHandle, StepResult, TopLogprobs
from nf.executors.cpu_attention import TileShape
from nf.executors.cpu_cache import PagedCache
from nf.executors.cpu_gemm import TILE, project
from nf.executors.cpu_logprobs import concatenate, top_logprobs
from nf.executors.cpu_operations import OPERATIONS, LayerRunner, rms_norm
from nf.executors.cpu_sampling import sample
from nf.executors.cpu_step import Step
from nf.executors.cpu_weights import prepare
from nf.executors.rope import rotary_table
from nf.executors.row_versions import RowVersions
from nf.executors.trace import Span, SpanRecorder
from nf.graphs.plan import LayerStep, PipelinePlan, unroll, validate
from nf.models.declaration import Model, ModelWeights
from nf.models.operations import Rows
from nf.scheduler.batch import Batch, Int32, PromptLogprobsBatch

Float32 = NDArray[np.float32]
Result = TypeVar("Result")

LOGITS_FLOATS = 1 << 22  # prompt log-probabilities are worked out for so many logits at a time


class CpuExecutor:
    """Runs steps one after another on a worker thread, in float32.

    A request's tokens do not depend on its neighbours, on the plan, on how its prompt was cut into chunks or on whether
    it was preempted: every product and every sum that makes up a row is independent of the other rows, down to the
    last bit (see cpu_gemm.py and cpu_attention.py).

    Args:
        model: what to run.
        weights: its weights, of any dtype.
        plan: order of the nano-operations; its ``dense_batch_size`` bounds the tokens of a step.
        page_size: tokens per KV page.
        num_pages, num_host_pages: of the KV cache and of its swap space.
        max_num_seqs: slots of the token buffer.
        max_model_len: tokens of a sequence.
        interleave: None runs the plan's own serial order; a generator draws, for each step, one of the orders that the
            dependencies allow, without regard to streams.

    Raises:
        PlanError: the plan does not fit the model.
        ModelError: the model has an operation this executor does not know.
    """

    def __init__(
        self,
        model: Model,
        weights: ModelWeights,
        plan: PipelinePlan,
        *,
        page_size: int,
        num_pages: int,
        num_host_pages: int,
        max_num_seqs: int,
        max_model_len: int,
        interleave: Random | None = None,
    ) -> None:
        for operation in model.operations:
            if operation.name not in OPERATIONS:
                raise ModelError("operations", f"{operation.name!r} is not one of {', '.join(OPERATIONS)}")
        validate(plan, model.operations)
        config = model.config
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self._config = config
        self._steps = unroll(plan, model.operations, config.num_layers)
        self._streams = tuple(stream.name for stream in plan.streams)
        self._interleave = interleave
        self._dense_batch_size = plan.dense_batch_size
        self._weights = prepare(weights)
        self._rotary = rotary_table(config.rope, config.head_dim, max_model_len + 1)
        self._shape = TileShape.of(config, page_size)
        self._cache = PagedCache(config, page_size=page_size, num_pages=num_pages, num_host_pages=num_host_pages)
        self._runner = LayerRunner(config, self._weights, self._cache, self._shape, plan.dense_batch_size)
        self._versions = RowVersions(model.operations, config.num_layers, plan.dense_batch_size)
        # One more than the longest sequence: a step may be under way when its predecessor's token ends a request.
        self._tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self._failure: BaseException | None = None
        self._closed = False
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nf-cpu-executor")

    def submit(self, batch: Batch) -> StepHandle:
        """Enqueue one step and return at once. A failure is delivered by the handle, and by every later one.

        Raises:
            EngineError: the executor is closed.
        """
        return self._enqueue(lambda: self._run(batch))

    def logits(self, batch: Batch, rows: Int32) -> Float32:
        """Run a step without sampling and return the logits of some rows, float32 [len(rows), vocab_size].

        Raises:
            EngineError: the executor is closed.
        """
        return self._enqueue(lambda: self._logits(self._forward(batch), rows)).result()

    def trace(self, batch: Batch) -> list[Span]:
        """Run a step once more and time it, nano-operation by nano-operation; what the step writes is written again.

        Raises:
            EngineError: the executor is closed.
        """

        def timed() -> list[Span]:
            recorder = SpanRecorder()
            self._run(batch, recorder)
            return recorder.spans

        return self._enqueue(timed).result()

    def close(self) -> None:
        """Finish what was submitted, free everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._worker.shutdown(wait=True)
        del self._weights, self._cache, self._runner, self._versions, self._tokens, self._rotary

    def _enqueue(self, work: Callable[[], Result]) -> Future[Result]:
        if self._closed:
            raise EngineError("the executor is closed")
        return self._worker.submit(self._guarded, work)

    def _guarded(self, work: Callable[[], Result]) -> Result:
        """Run on the worker thread; after a failure nothing runs any more."""
        if self._failure is not None:
            raise self._failure
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are looked for where they matter
                return work()
        except BaseException as error:
            self._failure = error
            raise

    def _run(self, batch: Batch, recorder: SpanRecorder | None = None) -> StepResult:
        hidden = self._forward(batch, recorder)
        prompt_logprobs = self._prompt_logprobs(hidden, batch.prompt_logprobs)
        sampling = batch.sampling
        rows, row_of = np.unique(sampling.rows, return_inverse=True)  # n > 1 repeats a row
        logits = self._logits(hidden, rows)[row_of]
        if recorder is not None:
            recorder.ended(self._streams[0], "logits")
        token_ids = sample(logits, sampling, self._tokens)
        self._tokens[sampling.slots, sampling.positions] = np.maximum(token_ids, 0)  # the next step may embed it
        logprobs = None
        if (sampling.logprobs >= 0).any():
            logprobs = top_logprobs(logits, np.maximum(token_ids, 0), int(sampling.logprobs.max()))
        if recorder is not None:
            recorder.ended(self._streams[0], "sampling")
        return StepResult(token_ids, logprobs, prompt_logprobs)

    def _forward(self, batch: Batch, recorder: SpanRecorder | None = None) -> Float32:
        """Everything up to the last layer's output, [tokens, hidden_size]; the rows are valid until the next step."""
        assert batch.num_tokens <= self._dense_batch_size
        self._cache.move_pages(batch)
        self._take_tokens(batch)
        hidden = self._runner.buffers.hidden[: batch.num_tokens]
        if not batch.num_tokens:
            return hidden
        hidden[...] = self._weights.embed[self._tokens[batch.token_slots, batch.positions]]
        step = Step(batch, self._shape, self._rotary)
        self._versions.begin(batch.num_tokens, batch.num_decode, step.first_row_of)
        if recorder is not None:
            recorder.ended(self._streams[0], "embed")
        for layer_step in self._order():
            start, stop = _clip(layer_step, step)
            if start < stop:
                self._versions.run(layer_step, start, stop)
                OPERATIONS[layer_step.operation.name](self._runner, step, layer_step.layer, start, stop)
                if recorder is not None:
                    name = f"{layer_step.operation.name} [{start}, {stop}) layer {layer_step.layer}"
                    recorder.ended(self._streams[layer_step.stream], name)
        self._versions.finish()
        return hidden

    def _take_tokens(self, batch: Batch) -> None:
        new = batch.token_ids >= 0
        self._tokens[batch.token_slots[new], batch.positions[new]] = batch.token_ids[new]
        for source, destination, length in batch.forks:
            self._tokens[destination, :length] = self._tokens[source, :length]

    def _order(self) -> Iterator[LayerStep]:
        if self._interleave is None:
            yield from self._steps
            return
        waits = [len(step.depends_on) for step in self._steps]
        followers: list[list[int]] = [[] for _ in self._steps]
        for index, step in enumerate(self._steps):
            for other in step.depends_on:
                followers[other].append(index)
        ready = [index for index, count in enumerate(waits) if not count]
        while ready:
            index = ready.pop(self._interleave.randrange(len(ready)))
            yield self._steps[index]
            for follower in followers[index]:
                waits[follower] -= 1
                if not waits[follower]:
                    ready.append(follower)

    def _logits(self, hidden: Float32, rows: NDArray[np.integer]) -> Float32:
        normed = rms_norm(hidden[rows], self._weights.final_norm, self._config.rms_norm_eps)
        logits = np.empty((len(rows), self._config.vocab_size), np.float32)
        project(normed, self._weights.lm_head, logits)
        return logits

    def _prompt_logprobs(self, hidden: Float32, asked: PromptLogprobsBatch) -> TopLogprobs | None:
        count = len(asked.rows)
        if not count:
            return None
        most = int(asked.logprobs.max())
        block = max(TILE, LOGITS_FLOATS // self._config.vocab_size // TILE * TILE)
        parts = [slice(start, start + block) for start in range(0, count, block)]
        return concatenate([top_logprobs(self._logits(hidden, asked.rows[p]), asked.targets[p], most) for p in parts])


def _clip(layer_step: LayerStep, step: Step) -> tuple[int, int]:
    """Rows of a nano-operation that this step has and that are of its kind."""
    start, stop = layer_step.start, min(layer_step.stop, step.num_tokens)
    if layer_step.operation.rows is Rows.DECODE:
        return start, min(stop, step.num_decode)
    if layer_step.operation.rows is Rows.PREFILL:
        return max(start, step.num_decode), stop
    return start, stop
