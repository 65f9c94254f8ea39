"""GpuExecutor: a plan's nano-operations as CUDA graphs. One upload, one replay and one download per step.

Graphs are captured at the start, a few for all sizes of batch (nf.graphs.pool): of the plans given for the steps that
they were made for, of the sequential plan for others. Steps run in the order they are submitted, on one stream; a
thread waits for their results, so that the next step is enqueued long before one ends.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf.errors import EngineError, ModelError
from nf.executors.base import StepHandle
from nf.executors.gpu_buffers import Sizes
from nf.executors.gpu_kernels import LayerKernels
from nf.executors.gpu_layers import OPERATIONS, Layers
from nf.executors.gpu_memory import step_memory
from nf.executors.gpu_outputs import PendingResult
from nf.executors.gpu_pages import KvPages
from nf.executors.gpu_trace import capture_traced
from nf.executors.gpu_weights import DeviceWeights
from nf.executors.trace import Span
from nf.graphs.capture import Graph, capture
from nf.graphs.partition import Lane, lanes
from nf.graphs.plan import PipelinePlan, unroll, validate
from nf.graphs.pool import GraphPool, StepPlan, step_plans
from nf.kernels.compile import Artifact
from nf.kernels.device import CudaError, Device, Event, Stream
from nf.kernels.load import KernelLoader
from nf.kernels.random_fill import RandomFill
from nf.kernels.stamp import Stamp
from nf.models.declaration import Model
from nf.scheduler.batch import Batch, Int32, without_sampling

Float32 = NDArray[np.float32]

MAX_IN_FLIGHT = 7  # steps; the engine never has more than two


@dataclass(slots=True)
class StepTimes:
    """What the GPU did with its time since the executor was made, seconds.

    Args:
        busy: between the first and the last kernel of a step.
        idle: between the last kernel of a step and the first of the next; waiting for requests counts as well.
    """

    busy: float = 0.0
    idle: float = 0.0


@dataclass(frozen=True, slots=True)
class _Running:
    """A step that was launched: its result to come, when it starts and ends, and who waits for it."""

    pending: PendingResult
    start: Event
    end: Event
    handle: StepHandle


class GpuExecutor:
    """Runs steps on one GPU, in bf16 with fp32 accumulation.

    Args:
        model: what to run.
        weights: on the device; the executor frees them.
        plans: of the nano-operations, each for some steps; the first one's ``dense_batch_size`` bounds the tokens of
            any step.
        device: where to run.
        artifacts: every kernel, compiled for it.
        page_size: tokens per KV page.
        num_pages, num_host_pages: of the KV cache and of its swap space in pinned host memory.
        max_num_seqs: slots of the token buffer, and most tokens a step samples.
        max_model_len: tokens of a sequence.

    Raises:
        PlanError: a plan does not fit the model or the GPU.
        ModelError: the model has an operation or a bias that there is no kernel for.
        DeviceMemoryError: the GPU has not enough memory free.

    Whatever is raised, nothing stays allocated, the weights included.
    """

    def __init__(
        self,
        model: Model,
        weights: DeviceWeights,
        plans: Sequence[PipelinePlan],
        *,
        device: Device,
        artifacts: Sequence[Artifact],
        page_size: int,
        num_pages: int,
        num_host_pages: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.times = StepTimes()
        self.startup: dict[str, float] = {}
        self._config = model.config
        self._model = model
        self._device = device
        self._loader = KernelLoader(artifacts)
        self._sizes = Sizes(plans[0].dense_batch_size, max_num_seqs, max_model_len, page_size)
        self._failure: Exception | None = None  # the first; set by either thread and never taken back
        self._closed = False
        with ExitStack() as undo:
            undo.callback(weights.free)
            undo.callback(self._loader.free)
            _check_model(model)
            for plan in plans:
                validate(plan, model.operations, gpu_sms=device.sms)
            steps = step_plans(plans, model.operations)
            self._allocate(weights, [step.plan for step in steps], undo)
            self._capture(steps, undo)
            self._undo = undo.pop_all()
        self._running: queue.SimpleQueue[_Running | None] = queue.SimpleQueue()
        self._in_flight = threading.Semaphore(MAX_IN_FLIGHT)
        self._collector = threading.Thread(target=self._collect, name="nf-gpu-executor", daemon=True)
        self._collector.start()

    def submit(self, batch: Batch) -> StepHandle:
        """Enqueue one step and return at once, unless MAX_IN_FLIGHT are under way: then wait for one. A failure is
        delivered by the handle, and by every later one.

        Raises:
            EngineError: the executor is closed.
        """
        self._check_open()
        handle: StepHandle = Future()
        handle.set_running_or_notify_cancel()  # a launched step runs to its end, whoever still wants its tokens
        try:
            if self._failure is not None:
                raise self._failure
            self._device.use()
            self._in_flight.acquire()
            start, end = self._timers[self._submitted % len(self._timers)]
            self._submitted += 1
            self._running.put(_Running(self._enqueue(batch, start, end), start, end, handle))
        except Exception as error:
            self._failure = self._failure or error
            handle.set_exception(error)
        return handle

    def logits(self, batch: Batch, rows: Int32) -> Float32:
        """Run a step without sampling and return the logits of some rows, float32 [len(rows), vocab_size].

        Raises:
            EngineError: the executor is closed.
        """
        self.submit(without_sampling(batch)).result()
        stream, block = self._stream.handle, self._sizes.logit_rows
        found = np.empty((len(rows), self._config.vocab_size), np.float32)
        buffers = self._memory.buffers
        for start in range(0, len(rows), block):
            part = rows[start : start + block].astype(np.int32)
            buffers.memory.upload(part, buffers.offsets["row_list"])
            buffers.memory.upload(np.array([len(part)], np.int32), buffers.offsets["row_count"])
            self._layers.logits(
                rows=buffers["row_list"], count=buffers["row_count"], capacity=block, stream=stream, pdl=False
            )
            self._stream.synchronize()
            buffers.memory.download(found[start : start + len(part)], buffers.offsets["logits"])
        return found

    def trace(self, batch: Batch) -> list[Span]:
        """Run a step again, at the clocks of a card that has been busy, and time every nano-operation; see
        ``Traceable``.

        Raises:
            EngineError: the executor is closed.
        """
        self._check_open()
        self._device.use()
        step, _ = self._pool.find(batch.num_tokens, batch.num_decode, batch.decode_keys)
        self._memory.inputs.upload(batch, self._stream.handle)
        return capture_traced(
            Layers(self._model, step.plan, self._kernels, self._memory, self._sizes, self._device.sms),
            unroll(step.plan, step.operations, self._config.num_layers),
            self._lanes(step.plan),
            self._stream,
            Stamp(self._loader),
        )

    def randomize_kv(self, seed: int) -> None:
        """Fill the KV cache with random keys and values, for benchmarks; waits.

        Raises:
            EngineError: the executor is closed.
        """
        self._check_open()
        self._device.use()
        fill = RandomFill(self._loader, sms=self._device.sms)
        self._pages.randomize(fill, seed, self._stream.handle)
        self._stream.synchronize()

    def close(self) -> None:
        """Finish what was submitted, free everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._running.put(None)
        self._collector.join()
        self._undo.callback(self._device.use)  # first
        try:
            self._undo.close()
        except CudaError:
            if self._failure is None:  # after a failed kernel the driver refuses even to free
                raise

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the executor is closed")

    # ---- start ----

    def _allocate(self, weights: DeviceWeights, plans: Sequence[PipelinePlan], undo: ExitStack) -> None:
        config, sizes, sms = self._config, self._sizes, self._device.sms
        started = time.perf_counter()
        self._stream = Stream()
        undo.callback(self._stream.free)
        self._pages = KvPages(
            config,
            device=self._device,
            page_size=self.page_size,
            num_pages=self.num_pages,
            num_host_pages=self.num_host_pages,
        )
        undo.callback(self._pages.free)
        self._kernels = LayerKernels(self._loader, self._model, sizes, page_bytes=self._pages.page_bytes, sms=sms)
        self._memory = step_memory(
            config,
            plans,
            sizes,
            self._kernels,
            weights,
            self._pages,
            undo,
            num_host_pages=self.num_host_pages,
            sms=sms,
        )

        def timer() -> Event:
            made = Event(timing=True)
            undo.callback(made.free)
            return made

        # Of the steps in flight, and of the one before, whose end the next step's idle time counts from.
        self._timers = [(timer(), timer()) for _ in range(MAX_IN_FLIGHT + 1)]
        self._submitted = 0
        self.startup["executor"] = time.perf_counter() - started

    def _capture(self, steps: Sequence[StepPlan], undo: ExitStack) -> None:
        started = time.perf_counter()
        stream = self._stream.handle
        graphs: dict[Hashable, Graph] = {}
        for step in steps:
            if step.work in graphs:  # as a stored plan that is sequential
                continue
            self._layers = Layers(self._model, step.plan, self._kernels, self._memory, self._sizes, self._device.sms)
            graph = graphs[step.work] = capture(
                unroll(step.plan, step.operations, self._config.num_layers),
                self._lanes(step.plan),
                stream,
                begin=self._layers.begin,
                launch=self._layers.launch,
                finish=self._layers.finish,
            )
            undo.callback(graph.free)
            graph.upload(stream)
        self._pool = GraphPool([(step, graphs[step.work]) for step in steps])
        self._stream.synchronize()
        undo.callback(self._stream.synchronize)  # first: part of a step that could not be enqueued whole may run yet
        self.startup["capture"] = time.perf_counter() - started

    def _lanes(self, plan: PipelinePlan) -> Sequence[Lane]:
        """A plan with a single stream over all SMs runs on the stream that graphs are launched on."""
        if len(plan.streams) == 1 and plan.streams[0].sms == "all":
            return (Lane(plan.streams[0].name, self._stream.handle, self._device.sms),)
        return lanes(plan.streams, self._device.sms)

    # ---- steps ----

    def _enqueue(self, batch: Batch, start: Event, end: Event) -> PendingResult:
        assert batch.num_tokens <= self._sizes.dense_batch_size
        stream = self._stream.handle
        self._memory.inputs.upload(batch, stream)
        start.record(stream)
        self._pages.move(batch, self._kernels.page_copy, self._memory.inputs.pointers, self._device.sms, stream)
        if batch.num_tokens:
            _, graph = self._pool.find(batch.num_tokens, batch.num_decode, batch.decode_keys)
            graph.launch(stream)
        self._prompt_logprobs(len(batch.prompt_logprobs.rows), stream)
        end.record(stream)
        return self._memory.outputs.download(batch, stream)

    def _prompt_logprobs(self, rows: int, stream: int) -> None:
        """Log-probabilities of prompt tokens, as many rows at a time as there is room for logits."""
        inputs, block = self._memory.inputs.pointers, self._sizes.logit_rows
        for start in range(0, rows, block):
            stop = min(start + block, self._sizes.dense_batch_size)
            self._layers.logits(
                rows=inputs["prompt_logprobs.rows"] + 4 * start,
                count=inputs["num_prompt_logprobs"],  # of all: a last block's rows without a target harm none
                capacity=stop - start,
                stream=stream,
                pdl=False,
            )
            self._kernels.prompt_logprobs.launch(
                logits=self._memory.buffers["logits"],
                stride=self._config.vocab_size,
                count=inputs["num_prompt_logprobs"],
                start=start,
                stop=stop,
                targets=inputs["prompt_logprobs.targets"],
                wanted=inputs["prompt_logprobs.logprobs"],
                logprobs=self._memory.outputs.prompt_logprobs,
                sms=self._device.sms,
                stream=stream,
            )

    def _collect(self) -> None:
        """On a thread of its own: complete the handles of steps as their results arrive."""
        self._device.use()
        before: Event | None = None
        while (step := self._running.get()) is not None:
            try:
                result = step.pending.result()
                self.times.busy += step.end.since(step.start)
                if before is not None:
                    self.times.idle += step.start.since(before)
                before = step.end
            except Exception as error:
                self._failure = self._failure or error
                step.handle.set_exception(error)
            else:
                step.handle.set_result(result)
            self._in_flight.release()


def _check_model(model: Model) -> None:
    for operation in model.operations:
        if operation.name not in OPERATIONS:
            raise ModelError("operations", f"{operation.name!r} is not one of {', '.join(OPERATIONS)}")
    if model.config.o_bias:
        raise ModelError("o_bias", "must be false on a GPU: its output projection adds no bias; the CPU's does")
