"""Nano-operations on the GPU, one or two at a time, at steady state: where the points of a profile come from.

A few layers of the model with random weights and KV pages stand for all of them; calls go round over the layers, so
that nothing is found in the L2 cache that would not be there in a step. Points follow one another without a pause,
which keeps the clocks where the power cap puts them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from nf.bench.card import driver_version, power_cap
from nf.bench.power import PowerMeter
from nf.bench.steady_step import step_batch
from nf.config import ModelConfig
from nf.executors.gpu_buffers import Sizes, buffer_layout
from nf.executors.gpu_kernels import LayerKernels
from nf.executors.gpu_layers import Layers
from nf.executors.gpu_memory import step_memory
from nf.executors.gpu_pages import KvPages, page_bytes
from nf.executors.gpu_weights import random_device_weights
from nf.graphs.capture import Graph, capture
from nf.graphs.partition import ARRANGEMENT, Lane, lanes, required_partitions
from nf.graphs.pipeline_plan import PipelinePlan, Stream
from nf.graphs.plan import LayerStep, sequential_plan
from nf.kernels import device as cuda
from nf.kernels.load import KernelLoader
from nf.kernels.random_fill import RandomFill
from nf.kernels.registry import all_sources, artifacts
from nf.kernels.source import HERE
from nf.models.declaration import Model
from nf.models.operations import Rows
from nf.models.registry import declare
from nf.planning.profile import CoRun, Cost, ProfileKey, Side, Sms, SoloKey
from nf.planning.profiling import ENDS, Extent
from nf.planning.steady_replays import Replays, probed, steady
from nf.scheduler.batch import Batch

LAYERS = 8  # their weights and pages are several times the L2 cache
PAGE_SIZE = 16
RUN_SECONDS = 0.4  # the energy counter moves every 0.1 s
GRAPH_SECONDS = 4e-3  # of one replay, so that the host's launches do not count
MAX_CALLS = 320  # in a graph
KV_BYTES = 48 << 30  # at most; sequences take pages in turn
PROMPT = 1024  # tokens, where the length of prompts does not matter
RANDOM_BUFFERS = ("hidden", "normed", "qkv", "attn", "activated", "permuted", "expert_down")


def profile_key(device: cuda.Device) -> ProfileKey:
    """What measurements on this GPU, with these kernels, are valid for."""
    state = hashlib.sha256()
    for source in sorted(all_sources(), key=lambda source: source.name):
        state.update(source.digest(device.arch).encode())
    state.update((HERE / "gemm_table.json").read_bytes())  # which of them is launched
    state.update(ARRANGEMENT.encode())  # and on which SMs
    return ProfileKey(device.name, driver_version() or "unknown", state.hexdigest()[:12])


class GpuBench:
    """A ``Bench`` on one GPU.

    Args:
        config: shape of the model.
        extent: bounds the batches.
        run: seconds that each point is measured for.
        page_size: of the KV cache, tokens.

    Raises:
        DeviceMemoryError: the GPU has not enough memory free; nothing stays allocated.
    """

    def __init__(
        self,
        config: ModelConfig,
        extent: Extent,
        device: cuda.Device,
        *,
        run: float = RUN_SECONDS,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.idle_watts, self.cap_watts = _idle_watts(), power_cap()
        self._config = config = replace(config, num_layers=min(LAYERS, config.num_layers))
        self.model: Model = declare(config)
        self._device, self._run_seconds = device, run
        self._operations = {operation.name: operation for operation in self.model.operations}
        decodes, tokens = extent.decode_rows[-1], extent.rows[-1]
        longest = max(PROMPT, *extent.decode_contexts, 2 * max(extent.prefill_contexts))
        self._sizes = Sizes(max(tokens, decodes), max(tokens, decodes), longest + 1, page_size)
        self._plans: dict[int, PipelinePlan] = {}
        self._lanes: dict[tuple[Sms, ...], Sequence[Lane]] = {}
        self._layers: dict[tuple[int, Sms], Layers] = {}
        with ExitStack() as undo:
            self._allocate(extent, decodes * extent.decode_contexts[-1], undo)
            self._undo = undo.pop_all()

    @property
    def broken(self) -> bool:
        """See ``Bench``; a context that a kernel has ruined answers every call with an error from then on."""
        try:
            self._streams[0].synchronize()
        except cuda.CudaError:
            return True
        return False

    def solo(self, key: SoloKey) -> Cost:
        operation, rows, sms, context = key
        tokens, batch = self._batch(operation, rows, context)
        self._load(batch)
        side = self._side(operation, tokens, sms, self._lane_of(sms), self._streams[0])
        pace = steady([side], self._run_seconds)
        (seconds,) = pace.seconds
        return Cost(seconds, seconds * pace.watts)

    def co_run(self, first: SoloKey, second: SoloKey) -> CoRun:
        decodes, context, tokens = second[1], second[3], max(first[1], second[1])
        lens, new = self._prompts(tokens - decodes, 0)
        self._load(self._step(decodes, [1] * decodes + new, [context] * decodes + lens))
        # The kernels of the memory-bound stream are more urgent, as in plans.
        places = self._lanes_of(first[2], second[2])
        sides = []
        with ExitStack() as undo:
            for key, lane, stream in zip((first, second), places, self._streams, strict=True):
                sides.append(self._side(key[0], key[1], key[2], lane, stream))
                undo.callback(sides[-1].graph.free)
            undo.pop_all()
        pace = steady(sides, self._run_seconds)
        return CoRun(Side(*first, pace.seconds[0]), Side(*second, pace.seconds[1]), pace.watts)

    def close(self) -> None:
        """Free everything; idempotent."""
        broken = self.broken
        try:
            self._undo.close()
        except cuda.CudaError:
            if not broken:  # after a failed kernel, which was told, the driver refuses even to free
                raise

    # ---- start ----

    def _allocate(self, extent: Extent, kv_tokens: int, undo: ExitStack) -> None:
        config, sizes, sms = self._config, self._sizes, self._device.sms
        weights = random_device_weights(self.model, 0)
        undo.callback(weights.free)
        page_size = sizes.page_size
        one_page = page_bytes(config, page_size) * config.num_layers
        free, _ = self._device.memory()
        self._num_pages = min(-(-kv_tokens // page_size) + sizes.max_num_seqs, min(KV_BYTES, free // 2) // one_page)
        pages = KvPages(config, device=self._device, page_size=page_size, num_pages=self._num_pages, num_host_pages=0)
        undo.callback(pages.free)
        self._loader = KernelLoader(artifacts(all_sources(), self._device.arch))
        undo.callback(self._loader.free)
        self._kernels = LayerKernels(self._loader, self.model, sizes, page_bytes=pages.page_bytes, sms=sms)
        tokens = {*extent.rows, *extent.light_rows, *extent.decode_rows, *extent.pair_rows}
        self._plans = {count: sequential_plan(self.model.operations, count) for count in sorted(tokens)}
        plans = list(self._plans.values())
        self._memory = step_memory(config, plans, sizes, self._kernels, weights, pages, undo, sms=sms)
        self._streams = (cuda.Stream(), cuda.Stream())
        for stream in self._streams:
            undo.callback(stream.free)
        self._fill(plans, pages)

    def _fill(self, plans: Sequence[PipelinePlan], pages: KvPages) -> None:
        """Random activations, keys and values: zeros would take less power than any real data."""
        sms, stream = self._device.sms, self._streams[0]
        fill = RandomFill(self._loader, sms=sms)
        arrays = buffer_layout(self._config, self._sizes, plans, sms).sizes
        todo = [(self._memory.buffers[name], arrays[name]) for name in RANDOM_BUFFERS if name in arrays]
        for number, (pointer, num_bytes) in enumerate(todo):
            fill.launch(pointer, num_bytes // 2, seed=1, tensor=number, std=1.0, stream=stream.handle)
        pages.randomize(fill, 2, stream.handle)
        stream.synchronize()

    # ---- one point ----

    def _batch(self, operation: str, rows: int, context: int) -> tuple[int, Batch]:
        """A step in which ``operation`` has so many rows, and tokens of its dense batch."""
        if operation == ENDS:
            return rows, self._step(rows, [1] * rows, [self._sizes.page_size] * rows)
        if self._operations[operation].rows is Rows.DECODE:
            return rows, self._step(rows, [1] * rows, [context] * rows)
        lens, new = self._prompts(rows, context)
        return rows, self._step(0, new, lens)

    def _prompts(self, rows: int, context: int) -> tuple[list[int], list[int]]:
        """Lengths and new tokens of prompts with ``rows`` tokens together, at ``context`` each on average."""
        length = 2 * context or PROMPT
        if rows < length and context:  # a piece out of the middle
            return [context + rows - rows // 2], [rows]
        new = [min(length, rows - start) for start in range(0, rows, length)]
        return new, new

    def _step(self, decodes: int, new: list[int], lens: list[int]) -> Batch:
        return step_batch(decodes, new, lens, self._sizes.page_size, self._num_pages)

    def _load(self, batch: Batch) -> None:
        stream = self._streams[0]
        stream.synchronize()
        self._memory.inputs.upload(batch, stream.handle)
        stream.synchronize()

    def _lane_of(self, sms: Sms) -> Lane:
        """A stream for a solo. It runs on one partition of a pair, as making partitions takes time; the other stays
        idle."""
        if sms == "all":
            return self._lanes_of("all")[0]
        left = self._device.sms - sms
        larger, smaller = self._lanes_of(max(sms, left), min(sms, left))
        return larger if larger.sms == sms else smaller

    def _lanes_of(self, *sms: Sms) -> Sequence[Lane]:
        """Streams on disjoint partitions; a second one is more urgent."""
        if sms not in self._lanes:
            required_partitions(sms)
            streams = [Stream(f"{place}", (), count, -place) for place, count in enumerate(sms)]
            self._lanes[sms] = lanes(streams, self._device.sms)
        return self._lanes[sms]

    def _side(self, name: str, tokens: int, sms: Sms, lane: Lane, origin: cuda.Stream) -> Replays:
        """Capture as many calls of an operation as fill a graph; the step is on the device."""
        layers = self._layers_for(tokens, sms)
        if name == ENDS:
            return self._whole_ends(layers, origin)
        layers.begin(origin.handle)
        ordered = [LayerStep(o, i, 0, tokens, 0, ()) for i in range(LAYERS) for o in self.model.operations]
        steps = [replace(step, layer=step.layer % self._config.num_layers) for step in ordered]
        # The rows of each expert follow from what came before. Attention has none, and must leave those of a GEMM
        # that it runs beside alone.
        if self._config.num_experts and self._operations[name].rows is Rows.ALL:
            for step in steps[: len(self._operations)]:
                layers.launch(step, Lane("origin", origin.handle, self._device.sms), False)
        origin.synchronize()
        return self._repeated([s for s in steps if s.operation.name == name], layers, lane, origin)

    def _whole_ends(self, layers: Layers, origin: cuda.Stream) -> Replays:
        """What comes before and after the layers, once per replay, captured as a step has it."""
        lane = Lane("origin", origin.handle, self._device.sms)
        graph = capture((), (lane,), origin.handle, begin=layers.begin, launch=layers.launch, finish=layers.finish)
        return probed(graph, 1, origin)

    def _repeated(self, steps: list[LayerStep], layers: Layers, lane: Lane, origin: cuda.Stream) -> Replays:
        """``steps`` once tell how often they fit into a graph."""

        def captured(times: int) -> Graph:
            return capture(
                steps * times,
                (lane,),
                origin.handle,
                begin=lambda _: None,
                launch=layers.launch,
                finish=lambda _: None,
            )

        trial = probed(captured(1), len(steps), origin)
        times = min(MAX_CALLS // len(steps), round(GRAPH_SECONDS / trial.seconds))
        if times <= 1:
            return trial
        trial.graph.free()
        graph = captured(times)
        with ExitStack() as undo:
            undo.callback(graph.free)
            graph.upload(origin.handle)
            undo.pop_all()
        return Replays(graph, len(steps) * times, origin, trial.seconds * times)

    def _layers_for(self, tokens: int, sms: Sms) -> Layers:
        key = tokens, sms
        if key not in self._layers:
            plan = self._plans[tokens]
            plan = replace(plan, streams=(replace(plan.streams[0], sms=sms),))  # attention is planned for its SMs
            self._layers[key] = Layers(self.model, plan, self._kernels, self._memory, self._sizes, self._device.sms)
        return self._layers[key]


def _idle_watts() -> float:
    """Power of the card with nothing to do, clocks as they are."""
    with PowerMeter(0) as meter:
        time.sleep(0.6)
    return meter.watts
