"""KV pages on the GPU, their swap space on the host, and the copies between them."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Thread

from nf.config import ModelConfig
from nf.kernels.copies import PageCopy
from nf.kernels.device import Device, DeviceMemory, PinnedMemory
from nf.kernels.random_fill import RandomFill
from nf.scheduler.batch import Batch

BF16_BYTES = 2


def page_bytes(config: ModelConfig, page_size: int) -> int:
    """Keys and values of one page in one layer, see kernels/kv_cache.py."""
    return 2 * config.num_kv_heads * config.head_dim * page_size * BF16_BYTES


class KvPages:
    """[layers, num_pages] pages on the device, zeroed, and [layers, num_host_pages] in pinned host memory.

    Pinning gigabytes takes most of a second, so it is done on the side, and in pieces, lest steps wait for the driver
    meanwhile; the first step that swaps waits for it.

    Args:
        device: whose memory it is.

    Raises:
        DeviceMemoryError: the GPU has not as much memory free.
    """

    def __init__(
        self, config: ModelConfig, *, device: Device, page_size: int, num_pages: int, num_host_pages: int
    ) -> None:
        self.page_bytes = page_bytes(config, page_size)
        self.layer_bytes = num_pages * self.page_bytes
        self._host_layer_bytes = num_host_pages * self.page_bytes
        self._memory = DeviceMemory(config.num_layers * self.layer_bytes, f"{num_pages} KV pages").zero()
        self.pointer = self._memory.pointer
        self._host: Future[PinnedMemory] = Future()
        self._pin(device, config.num_layers * self._host_layer_bytes)

    def _pin(self, device: Device, num_bytes: int) -> None:
        def pin() -> None:
            try:
                device.use()
                self._host.set_result(PinnedMemory(num_bytes, in_pieces=True))
            except Exception as error:
                self._host.set_exception(error)

        Thread(target=pin, name="nf-pin-host-pages", daemon=True).start()

    def move(self, batch: Batch, copy: PageCopy, inputs: dict[str, int], sms: int, stream: int) -> None:
        """Enqueue the copies of whole pages that a step begins with, if it has any.

        Raises:
            CudaError: there is no RAM for the host pages; told by the first step that can know, swap or not.
        """
        here, stride = self.pointer, self.layer_bytes
        swaps = len(batch.swap_out) or len(batch.swap_in)
        if swaps or self._host.done():
            there, host_stride = self._host.result().pointer, self._host_layer_bytes
            if len(batch.swap_out):
                copy.launch(
                    source=here, source_stride=stride, destination=there, destination_stride=host_stride,
                    pairs=inputs["swap_out"], count=inputs["num_swap_out"], sms=sms, stream=stream,
                )  # fmt: skip
            if len(batch.swap_in):
                copy.launch(
                    source=there, source_stride=host_stride, destination=here, destination_stride=stride,
                    pairs=inputs["swap_in"], count=inputs["num_swap_in"], sms=sms, stream=stream,
                )  # fmt: skip
        if len(batch.page_copies):
            copy.launch(
                source=here, source_stride=stride, destination=here, destination_stride=stride,
                pairs=inputs["page_copies"], count=inputs["num_page_copies"], sms=sms, stream=stream,
            )  # fmt: skip

    def randomize(self, fill: RandomFill, seed: int, stream: int) -> None:
        """Enqueue N(0, 1) for every key and value, for benchmarks: zeros take less power than real data."""
        for layer in range(self._memory.num_bytes // self.layer_bytes if self.layer_bytes else 0):
            count = self.layer_bytes // BF16_BYTES
            fill.launch(self.pointer + layer * self.layer_bytes, count, seed=seed, tensor=layer, std=1.0, stream=stream)

    def free(self) -> None:
        """Give all memory back; idempotent. No copy may be under way."""
        self._memory.free()
        if self._host.exception() is None:
            self._host.result().free()
