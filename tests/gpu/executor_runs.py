"""A model, its weights and the steps that tests of the GPU executor run, and what is expected of them."""

from __future__ import annotations

import numpy as np
from executor_cases import reference_logits, sampling_batch
from gpu_runs import MAX_LEN, SLOTS, model_for_gpu, relative_errors, weights_for_gpu

from nf.executors.gpu import GpuExecutor
from nf.scheduler.batch import Batch, SamplingBatch

ERROR = 2e-2  # relative, of the logits of a position: bf16 against float64
WORST_ERROR, MEAN_ERROR = 3e-2, 1.2e-2  # of hundreds of positions
"""Simulated in bfloat16, with weights of attention that are rounded at random places, the worst of 600 positions of a
model is .006 to .025 away, and all on average .0047 to .0097."""
DENSE = 300  # more than the largest graph of a smaller size, so that large batches run the plan itself
MODEL = model_for_gpu()
WEIGHTS = weights_for_gpu(MODEL, 0)
LENGTHS = (21, 3, 60, 33, 150, 130)  # the last two fill a dense batch together
PROMPT = np.random.default_rng(0).integers(0, 272, 21).tolist()


def random_sequences(seed: int, longest: int = MAX_LEN, slots: int = SLOTS) -> dict[int, list[int]]:
    rng = np.random.default_rng(seed)
    lengths = [longest, *rng.integers(1, longest + 1, slots - 1).tolist()]
    return {slot: rng.integers(0, 272, length).tolist() for slot, length in enumerate(lengths)}


def random_ids(seed: int) -> dict[int, list[int]]:
    """Sequences of MAX_LEN tokens."""
    return {slot: np.random.default_rng([seed, slot]).integers(0, 272, MAX_LEN).tolist() for slot in range(SLOTS)}


def check_logits(found: dict[int, np.ndarray], sequences: dict[int, list[int]], model=MODEL, weights=WEIGHTS) -> None:
    errors = [relative_errors(found[i], reference_logits(model, weights, ids)) for i, ids in sequences.items()]
    assert np.concatenate(errors).max() <= WORST_ERROR
    assert np.concatenate(errors).mean() <= MEAN_ERROR


def last_logits(ids: list[int], weights=WEIGHTS) -> np.ndarray:
    return reference_logits(MODEL, weights, ids)[-1]


def tokens_of(run: GpuExecutor, batch: Batch) -> list[int]:
    return run.submit(batch).result().token_ids.tolist()


def pairs(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, np.int32)


def nothing() -> SamplingBatch:
    return sampling_batch([], [], [])
