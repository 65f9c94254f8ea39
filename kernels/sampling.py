"""Sampling from logits, and log-probabilities, on the device; nf/executors/cpu_sampling.py is the reference.

Shapes (R rows, V vocab_size; fields of SamplingBatch as there, on the device):

- logits bf16 or fp32 [R, stride], row i for sample i; stride is a multiple of 8, what is beyond V is not used
- token_ids int32 [R]: chosen, −1 where there is nothing to choose from (NaN or +∞ in the row, or all forbidden)
- tokens int32 [slots, tokens_stride]: the token buffer; its rows up to ``positions`` are the history, and the chosen
  token (0 for −1) is written at (slot, position)
- logprobs, ranks [R] fp32, int32, of rows whose ``logprobs`` is ≥ 0; top_ids, top_logprobs [R, 20] of rows whose
  ``logprobs`` is above 0, −1 and −∞ beyond as many; all from raw logits. Other rows are left as they were

A greedy row is read once: maximum, its id and Σ exp in one pass. With a few hundred most likely tokens to be known
(top-k, log-probabilities), that pass lists what is above a cut guessed from a sample, and the list, sorted, gives the
rest. Noise is Philox4x32-10 and Gumbel-max as on the CPU, with its logarithms worked out only where a cheap bound says
the token may win. Without a filter, and where no log-probabilities but the chosen token's are asked for, the first pass
lists what may win, and the winner is among them. With top-p there are two ways. Where most tokens have some weight and
top-p keeps most of it, the first pass does the same, for whatever top-p may keep, and a second, seldom a third, finds
out which of the listed are kept, by summing what weighs more. Elsewhere the first pass counts logits into 8192 equal
bins, from which follow bounds of the value at which top-p cuts, and the second collects the few tokens within the
bounds and draws for those above (draw_first.cuh, draw.cuh, select.cuh).
Penalties, bias, allowed ids and bad words act on an fp32 copy of the row. Rows that ask for none of this pay for none
of it.

``num_samples`` and the fields of SamplingBatch are inputs of the step: they are read before the kernel before has
ended, and must not be its output.

``PromptLogprobs`` does the log-probabilities alone, for given tokens.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from typing import Literal, NamedTuple

from nf.errors import InputError
from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource, ParameterKind

LogitsType = Literal["bf16", "fp32"]
LOGITS_TYPES: tuple[LogitsType, ...] = ("bf16", "fp32")
MAX_LOGPROBS = 20  # MAX_TOP of logits.cuh

_THREADS = 256
_CTAS_PER_SM = 2
_SHARED_BYTES = 51 * 1024 + 3 * 2048 * (_THREADS // 32)  # at least Shared of logits.cuh and the rings of row_stream.cuh
_COUNTER_BYTES = 256
_COMMON = (
    "logprobs.cuh", "select.cuh", "first_pass.cuh", "row_stream.cuh", "logits.cuh", "reduce.cuh", "memory.cuh",
    "hopper.cuh",
)  # fmt: skip
_LOGITS: tuple[ParameterKind, ...] = ("pointer", "int32", "int32")  # where, stride, vocab_size


def sources() -> list[KernelSource]:
    """Sampling and prompt log-probabilities, for each type of logits."""
    return [make(dtype) for dtype in LOGITS_TYPES for make in (sample_source, prompt_logprobs_source)]


def sample_source(dtype: LogitsType) -> KernelSource:
    return KernelSource(
        name=f"sample_{dtype}",
        language="cuda",
        files=("sampling.cu", "draw.cuh", "draw_first.cuh", "bar.cuh", "edit_logits.cuh", "philox.cuh", *_COMMON),
        parameters=(*_LOGITS, len(fields(SamplingArrays)), "pointer", "int32", *("pointer",) * 7, "int32"),
        entry="sample",
        config=(("BF16", dtype == "bf16"),),
    )


def prompt_logprobs_source(dtype: LogitsType) -> KernelSource:
    return KernelSource(
        name=f"prompt_logprobs_{dtype}",
        language="cuda",
        files=("prompt_logprobs.cu", *_COMMON),
        parameters=(*_LOGITS, "pointer", "int32", "int32", *("pointer",) * 6),
        entry="prompt_logprobs",
        config=(("BF16", dtype == "bf16"),),
    )


@dataclass(frozen=True)
class SamplingArrays:
    """Device pointers to a SamplingBatch's arrays, in the kernel's order; ``num_samples`` int32 [1]: rows there are."""

    num_samples: int
    slots: int
    positions: int
    prompt_lens: int
    temperature: int
    top_k: int
    top_p: int
    min_p: int
    presence_penalty: int
    frequency_penalty: int
    repetition_penalty: int
    seeds: int
    sample_index: int
    logprobs: int
    bias_indptr: int
    bias_ids: int
    bias_values: int
    allowed_indptr: int
    allowed_ids: int
    bad_words_indptr: int
    bad_words_token_indptr: int
    bad_words_ids: int

    @cached_property
    def packed(self) -> bytes:
        """What the kernel is given."""
        return struct.pack(f"{len(fields(self))}Q", *astuple(self))


class LogprobArrays(NamedTuple):
    """Device pointers to where log-probabilities go, as TopLogprobs but always with 20 columns."""

    logprobs: int  # fp32 [R]
    ranks: int  # int32 [R]
    top_ids: int  # int32 [R, 20]
    top_logprobs: int  # fp32 [R, 20]


class Sampler:
    """Launches sampling over one vocabulary.

    Args:
        loader: of ``sources()``, at least of this type of logits.
        dtype: of the logits.
        vocab_size: V.
        tokens_stride: tokens of a row of the token buffer.
        sms: multiprocessors of the GPU.
    """

    def __init__(
        self, loader: KernelLoader, dtype: LogitsType, *, vocab_size: int, tokens_stride: int, sms: int
    ) -> None:
        self._kernel = loader.cuda(sample_source(dtype).name, shared_bytes=_SHARED_BYTES)
        self._vocab_size = vocab_size
        self._tokens_stride = tokens_stride
        self._ctas = _CTAS_PER_SM * sms
        self._scratch_stride = -(-vocab_size // 8) * 8

    @property
    def workspace_bytes(self) -> int:
        """Device memory, 256-byte aligned: counters, which must be 0 before the first launch, and edited rows."""
        return _COUNTER_BYTES + 4 * self._ctas * self._scratch_stride

    def launch(
        self,
        *,
        logits: int,
        stride: int,
        arrays: SamplingArrays,
        tokens: int,
        token_ids: int,
        logprobs: LogprobArrays,
        workspace: int,
        capacity: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """Sample a token for every row that there is.

        Args:
            logits, tokens, token_ids: device pointers, see the module.
            stride: logits from a row to the next.
            workspace: device pointer; see ``workspace_bytes``. Launches that may overlap need one each.
            capacity: most rows there may be.
            pdl: start before the kernel before has ended, and wait for it on the device.
        """
        _check_stride(stride, self._vocab_size)
        self._kernel.launch(
            logits, stride, self._vocab_size, arrays.packed, tokens, self._tokens_stride, token_ids,
            *logprobs, workspace, workspace + _COUNTER_BYTES, self._scratch_stride,
            grid=max(1, min(capacity, self._ctas)), block=_THREADS, stream=stream, pdl=pdl,
        )  # fmt: skip


class PromptLogprobs:
    """Launches log-probabilities of given tokens.

    Args:
        loader: of ``sources()``, at least of this type of logits.
        dtype: of the logits.
        vocab_size: V.
    """

    def __init__(self, loader: KernelLoader, dtype: LogitsType, *, vocab_size: int) -> None:
        self._kernel = loader.cuda(prompt_logprobs_source(dtype).name, shared_bytes=_SHARED_BYTES)
        self._vocab_size = vocab_size

    def launch(
        self,
        *,
        logits: int,
        stride: int,
        count: int,
        start: int,
        stop: int,
        targets: int,
        wanted: int,
        logprobs: LogprobArrays,
        sms: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """Report the rows that there are in [start, stop); row ``start`` is the first of ``logits``.

        Args:
            logits: device pointer [stop − start, stride].
            count, targets, wanted: device pointers to the number of rows, and to ``targets`` and ``logprobs`` of the
                PromptLogprobsBatch.
            sms: multiprocessors to spread over.
            pdl: start before the kernel before has ended, and wait for it on the device.
        """
        _check_stride(stride, self._vocab_size)
        self._kernel.launch(
            logits, stride, self._vocab_size, count, start, stop, targets, wanted,
            *logprobs,
            grid=max(1, min(stop - start, _CTAS_PER_SM * sms)), block=_THREADS, stream=stream, pdl=pdl,
        )  # fmt: skip


def _check_stride(stride: int, vocab_size: int) -> None:
    if stride % 8 or stride < vocab_size:
        raise InputError("stride", f"must be a multiple of 8 and at least {vocab_size}, not {stride}")
