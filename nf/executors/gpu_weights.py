"""Weights on the GPU: one allocation, filled from safetensors files or with random numbers.

Files are read by several threads into page-locked buffers, a chunk at a time, and copied from there straight to where
the chunk belongs in its fused weight, so that reading, converting and copying overlap and no tensor is ever whole in
host memory.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nf.errors import ModelError
from nf.executors.array_layout import aligned
from nf.kernels.device import Device, DeviceMemory, Event, PinnedMemory, Stream, checked, copy
from nf.models.declaration import Model, Weight
from nf.weights import DTYPES, Checkpoint, TensorEntry, check_weights, checkpoint_parts, is_stacked, is_tied

VALUE_BYTES = 2  # bfloat16
CHUNK_BYTES = 4 << 20  # of a file, read at a time
MAX_THREADS = 12  # half as many already copy from the page cache as fast as the link takes it
_BUFFERS = 2  # per thread: one is filled while the other is copied from
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ONE = 0x3F80  # 1.0 as bfloat16


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Where each weight lies, bytes from the start of the one allocation of ``num_bytes``."""

    embed: int
    final_norm: int
    lm_head: int  # embed's if tied
    layers: tuple[dict[str, int], ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWeights:
    """Weights in bfloat16 on the GPU, as device pointers; names and fused shapes are those that the model declares."""

    embed: int
    final_norm: int
    lm_head: int  # embed's if tied
    layers: tuple[dict[str, int], ...]
    memory: DeviceMemory

    @property
    def num_bytes(self) -> int:
        return self.memory.num_bytes

    def free(self) -> None:
        """Give the memory back; idempotent. The pointers become invalid."""
        self.memory.free()


def layout(model: Model) -> WeightLayout:
    """Places for all weights of a model, one after the other and aligned."""
    end = 0

    def place(weight: Weight) -> int:
        nonlocal end
        start = end
        end = aligned(start + VALUE_BYTES * math.prod(weight.shape))
        return start

    embed, final_norm = place(model.embed), place(model.final_norm)
    lm_head = embed if is_tied(model) else place(model.lm_head)
    layers = tuple({w.name: place(w) for w in model.layer_weights} for _ in range(model.config.num_layers))
    return WeightLayout(embed, final_norm, lm_head, layers, end)


def load_device_weights(model: Model, model_dir: Path) -> DeviceWeights:
    """Read, fuse and convert all weights of a model into memory of the current GPU.

    Raises:
        ModelError: a file is missing, malformed, cut short or cannot be read, or the checkpoint does not fit the
            declaration (``check_weights``).
        DeviceMemoryError: the GPU has not as much memory free.
    """
    checkpoint = Checkpoint(model_dir)
    check_weights(model, checkpoint)
    places = layout(model)
    memory = DeviceMemory(places.num_bytes, "weights")
    try:
        _read_all(list(_chunks(model, checkpoint, places)), memory)
    except BaseException:
        memory.free()
        raise
    return _at(places, memory)


def random_device_weights(model: Model, seed: int, std: float = 0.02) -> DeviceWeights:
    """Weights for benchmarks, drawn on the current GPU: matrices N(0, std), biases 0, norms 1.

    The same seed gives the same weights. Compiles ``random_fill`` where it is not at hand.

    Raises:
        CompileError: the kernel cannot be had.
        DeviceMemoryError: the GPU has not as much memory free.
    """
    from cuda.bindings import driver

    from nf.kernels.load import KernelLoader
    from nf.kernels.random_fill import RandomFill, sources
    from nf.kernels.registry import artifacts

    device = Device(int(checked(driver.cuCtxGetDevice())))
    loader = KernelLoader(artifacts(sources(), device.arch))
    places = layout(model)
    with ExitStack() as undo:
        memory = DeviceMemory(places.num_bytes, "weights")
        undo.callback(memory.free)
        with ExitStack() as done:
            done.callback(loader.free)
            fill = RandomFill(loader, sms=device.sms)
            stream = Stream()
            done.callback(stream.free)
            done.callback(stream.synchronize)  # before the kernel is unloaded, whatever happens
            for tensor, (weight, _, place) in enumerate(_placed(model, places)):
                pointer, count = memory.pointer + place, math.prod(weight.shape)
                if len(weight.shape) > 1:
                    fill.launch(pointer, count, seed=seed, tensor=tensor, std=std, stream=stream.handle)
                else:
                    constant = _ONE if weight.name.endswith("_norm") else 0
                    checked(driver.cuMemsetD16Async(pointer, constant, count, stream.handle))
        undo.pop_all()
    return _at(places, memory)


def _at(places: WeightLayout, memory: DeviceMemory) -> DeviceWeights:
    """The layout as pointers."""
    start = memory.pointer
    return DeviceWeights(
        start + places.embed,
        start + places.final_norm,
        start + places.lm_head,
        tuple({name: start + place for name, place in layer.items()} for layer in places.layers),
        memory,
    )


def _placed(model: Model, places: WeightLayout) -> Iterator[tuple[Weight, int, int]]:
    """Every weight that has a place of its own, its layer and its place."""
    yield model.embed, 0, places.embed
    yield model.final_norm, 0, places.final_norm
    if not is_tied(model):
        yield model.lm_head, 0, places.lm_head
    for layer, offsets in enumerate(places.layers):
        for weight in model.layer_weights:
            yield weight, layer, offsets[weight.name]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Values to be read in one go, and where they go: ``runs`` runs of ``run`` values, ``pitch`` values apart."""

    path: Path
    dtype: np.dtype[Any]
    offset: int  # bytes from the start of the file
    place: int  # of the first value, bytes from the start of the allocation
    runs: int
    run: int
    pitch: int

    @property
    def count(self) -> int:
        return self.runs * self.run

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return self.count * self.dtype.itemsize


def _chunks(model: Model, checkpoint: Checkpoint, places: WeightLayout) -> Iterator[_Chunk]:
    """All that is to be read, tensor by tensor."""
    for weight, layer, place in _placed(model, places):
        parts = list(checkpoint_parts(weight, layer))
        row = math.prod(parts[0][1][1:])  # values
        for index, (name, shape) in enumerate(parts):
            expert, part = divmod(index, len(weight.parts))
            start = expert * math.prod(weight.shape[1:]) if is_stacked(weight) else 0
            if weight.interleave:
                run, pitch = weight.interleave * row, len(weight.parts) * weight.interleave * row
                start += part * run
            else:
                run = pitch = row
                start += sum(weight.part_rows[:part]) * row
            runs = shape[0] * row // run
            yield from _split(checkpoint.entry(name), place + VALUE_BYTES * start, runs, run, pitch)


def _split(entry: TensorEntry, place: int, runs: int, run: int, pitch: int) -> Iterator[_Chunk]:
    """One tensor as chunks of whole runs, of about CHUNK_BYTES."""
    dtype = DTYPES[entry.dtype]
    step = max(1, CHUNK_BYTES // (run * dtype.itemsize))
    for first in range(0, runs, step):
        yield _Chunk(
            entry.path,
            dtype,
            entry.offset + first * run * dtype.itemsize,
            place + first * pitch * VALUE_BYTES,
            min(step, runs - first),
            run,
            pitch,
        )


def _read_all(chunks: list[_Chunk], memory: DeviceMemory) -> None:
    """Read all chunks in parallel, in the order in which they lie in the files; returns when they are on the GPU."""
    from cuda.bindings import driver

    context = checked(driver.cuCtxGetCurrent())
    buffer_bytes = max(chunk.num_bytes for chunk in chunks)
    waiting = deque(sorted(chunks, key=lambda chunk: (chunk.path, chunk.offset)))
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), -(-len(chunks) // _BUFFERS))

    def work() -> None:
        checked(driver.cuCtxSetCurrent(context))
        with ExitStack() as stack:
            reader = _Reader(memory.pointer, buffer_bytes, stack)
            while waiting:
                try:
                    chunk = waiting.popleft()
                except IndexError:  # another thread was quicker
                    break
                reader.read(chunk)
            reader.finish()

    with ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(threads, "nf-weights"))
        stack.callback(waiting.clear)  # after an error or an interrupt the others stop at once
        for job in concurrent.futures.as_completed([pool.submit(work) for _ in range(threads)]):
            job.result()


class _Reader:
    """One thread's files, buffers and stream; all are given back when ``stack`` ends."""

    def __init__(self, memory: int, buffer_bytes: int, stack: ExitStack) -> None:
        self._memory = memory
        self._stack = stack
        self._files: dict[Path, int] = {}
        self._scratch = np.empty(0, np.uint8)  # what is to be converted; grows to a chunk when there is such
        self._buffers: deque[tuple[PinnedMemory, Event]] = deque()
        for _ in range(_BUFFERS):
            buffer = PinnedMemory(buffer_bytes)
            stack.callback(buffer.free)
            event = Event()
            stack.callback(event.free)
            self._buffers.append((buffer, event))
        self._stream = Stream()
        stack.callback(self._stream.free)
        stack.callback(self._stream.synchronize)  # first, also after an error: copies may be under way

    def read(self, chunk: _Chunk) -> None:
        """Read and convert one chunk and enqueue its copy."""
        buffer, event = self._buffers[0]
        self._buffers.rotate(-1)
        event.synchronize()  # the copy that used this buffer last
        if chunk.dtype == _BFLOAT16:
            self._fill(chunk, buffer.array[: chunk.num_bytes])
        else:
            if len(self._scratch) < chunk.num_bytes:
                self._scratch = np.empty(chunk.num_bytes, np.uint8)
            source = self._scratch[: chunk.num_bytes]
            self._fill(chunk, source)
            with np.errstate(over="ignore", invalid="ignore"):  # as nf.weights does: inf and NaN stay what they are
                buffer.array[: chunk.count * VALUE_BYTES].view(_BFLOAT16)[...] = source.view(chunk.dtype)
        self._copy(chunk, buffer.pointer)
        event.record(self._stream.handle)

    def finish(self) -> None:
        """Wait until everything is on the GPU."""
        self._stream.synchronize()

    def _fill(self, chunk: _Chunk, target: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Read a chunk's bytes."""
        done = 0
        try:
            if chunk.path not in self._files:
                self._files[chunk.path] = os.open(chunk.path, os.O_RDONLY)
                self._stack.callback(os.close, self._files[chunk.path])
            while done < chunk.num_bytes:
                num_read = os.preadv(self._files[chunk.path], [target[done:].data], chunk.offset + done)
                if num_read == 0:
                    raise ModelError(str(chunk.path), f"ends {chunk.num_bytes - done} bytes before its tensors do")
                done += num_read
        except OSError as error:
            raise ModelError(str(chunk.path), f"cannot be read: {error.strerror or error}") from error

    def _copy(self, chunk: _Chunk, source: int) -> None:
        from cuda.bindings import driver

        target, stream = self._memory + chunk.place, self._stream.handle
        if chunk.run == chunk.pitch:
            copy(target, source, chunk.count * VALUE_BYTES, stream)
            return
        rectangle = driver.CUDA_MEMCPY2D()
        rectangle.srcMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_HOST
        rectangle.srcHost = source
        rectangle.srcPitch = rectangle.WidthInBytes = chunk.run * VALUE_BYTES
        rectangle.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        rectangle.dstDevice = target
        rectangle.dstPitch = chunk.pitch * VALUE_BYTES
        rectangle.Height = chunk.runs
        checked(driver.cuMemcpy2DAsync(rectangle, stream))
