"""Tests of this folder need a CUDA device, PyTorch as the reference, and a compiled bundle or the compilers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest


def _has_gpu() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


HERE = Path(__file__).parent

SANITIZED = {
    "test_decode_attention": ("test_mixed_lengths", "test_no_decode_rows"),
    "test_gather": ("test_embed", "test_page_copies", "test_pages_swap_to_pinned_memory_and_back", "test_forks"),
    "test_gemm": ("test_residual_in_place", "test_more_rows_than_the_capacity_change_nothing"),
    "test_gpu_executor": (
        "test_plans_that_cut_anywhere", "test_sampled_tokens_feed_the_next_steps_before_the_host_knows_them",
        "test_one_step_may_swap_out_and_in_through_the_same_host_page_and_then_copy",
        "test_siblings_share_full_pages_and_get_their_own_copy_of_the_last",
    ),
    "test_gpu_executor_life": (
        "test_a_step_may_hold_no_tokens_and_sample_nothing",
        "test_a_traced_step_tells_of_every_nano_operation_and_changes_nothing",
    ),
    "test_gpu_executor_sampling": ("test_logprobs_are_those_of_the_raw_logits",),
    "test_moe": ("test_router", "test_permutation", "test_combine", "test_block"),
    "test_norm": ("test_sizes", "test_ranges"),
    "test_prefill_attention": ("test_ragged_chunks", "test_without_prefill_rows_nothing_is_written"),
    "test_rope_append": ("test_configurations", "test_ranges", "test_no_tokens"),
    "test_sampling": (
        "test_edits", "test_rows_of_every_kind_one_after_the_other", "test_only_the_rows_there_are",
        "test_prompt_logprobs",
    ),
    "test_stream": ("test_copy", "test_read_ends"),
}  # fmt: skip
"""Tests that ``make sanitize`` runs, some of every kernel's and of the whole executor's, by file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = None if _has_gpu() else pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if HERE not in item.path.parents:
            continue
        if skip is not None:
            item.add_marker(skip)
        if getattr(item, "originalname", None) in SANITIZED.get(item.path.stem, ()):
            item.add_marker(pytest.mark.sanitize)


@pytest.fixture
def crowd() -> Callable[[], None]:
    """Call it to have a kernel read and write memory on every multiprocessor, beside what is launched next: then a read
    of shared memory may wait in its multiprocessor's queue for longer than a bulk copy takes."""
    torch = pytest.importorskip("torch")
    memory, stream = torch.zeros(2, 1 << 26, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()

    def enter() -> None:
        with torch.cuda.stream(stream):
            memory[0].copy_(memory[1])

    return enter
