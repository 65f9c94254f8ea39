"""What a step's kernels find on the GPU is what its Batch holds, however many steps are under way."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from operator import attrgetter

import device_double
import numpy as np
import pytest
from executor_cases import NO_IDS, indptr, sampling_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.executors import gpu_inputs
from nf.executors.gpu_inputs import COUNTS, StepInputs
from nf.scheduler.batch import Batch, PromptLogprobsBatch

TOKENS, SEQS, MODEL_LEN, PAGE, HOST_PAGES = 24, 6, 40, 8, 7
RANGES = ((0, 24), (0, 10), (10, 24), (10, 10))


@pytest.fixture
def inputs(monkeypatch):
    device_double.install(monkeypatch, gpu_inputs)
    made = make()
    yield made
    made.free()


def make(num_host_pages: int = HOST_PAGES) -> StepInputs:
    sizes = {"max_num_seqs": SEQS, "max_model_len": MODEL_LEN, "page_size": PAGE, "num_host_pages": num_host_pages}
    return StepInputs(dense_batch_size=TOKENS, ranges=RANGES, **sizes)


def random_batch(rng: np.random.Generator, step: int, *, extras: bool, full: bool = False) -> Batch:
    """Any numbers at all within the bounds; ``full`` reaches them."""

    def ints(*shape: int) -> np.ndarray:
        return rng.integers(-1, 1 << 30, shape, dtype=np.int32)

    def size(most: int) -> int:
        return most if full else int(rng.integers(0, most + 1))

    def some(most: int) -> int:
        return size(most) if extras else 0

    def ids(most: int) -> list[int]:
        return ints(some(most)).tolist()

    num_tokens, num_seqs, num_samples, num_prompt = size(TOKENS), size(SEQS), size(SEQS), some(TOKENS)
    rows, slots, positions = ints(3, num_samples).tolist()
    sampling = sampling_batch(
        rows,
        slots,
        positions,
        temperature=rng.random(num_samples),
        top_p=rng.random(num_samples),
        seeds=rng.integers(0, 1 << 64, num_samples, dtype=np.uint64),
        top_k=ints(num_samples),
        bias=[{i: -float("inf") for i in ids(9)} for _ in rows],
        allowed=[ids(5) for _ in rows],
        words=[[[1, *ids(3)] for _ in range(some(4))] for _ in rows],
    )
    return Batch(
        step=step,
        num_decode=size(SEQS),
        **{name: ints(num_tokens) for name in ("token_ids", "token_slots", "positions")},
        **{name: ints(num_seqs) for name in ("slots", "kv_lens", "last_page_len")},
        qo_indptr=indptr([3] * num_seqs),
        kv_indptr=indptr([2] * num_seqs),
        kv_indices=ints(size(SEQS * MODEL_LEN // PAGE)),
        sampling=sampling,
        prompt_logprobs=PromptLogprobsBatch(*ints(4, num_prompt)),
        swap_out=ints(some(HOST_PAGES), 2),
        swap_in=ints(some(HOST_PAGES), 2),
        page_copies=ints(some(SEQS), 2),
        forks=ints(some(SEQS), 3),
    )


def check(inputs: StepInputs, batch: Batch) -> None:
    """The device holds the batch."""
    counts = {name: device_double.at(inputs.pointers[name], (1,), np.int32)[0] for name in COUNTS}
    assert counts == {
        "num_tokens": len(batch.token_ids),
        "num_decode": batch.num_decode,
        "num_seqs": len(batch.slots),
        "num_samples": len(batch.sampling.rows),
        "num_swap_out": len(batch.swap_out),
        "num_swap_in": len(batch.swap_in),
        "num_page_copies": len(batch.page_copies),
        "num_forks": len(batch.forks),
        "num_prompt_logprobs": len(batch.prompt_logprobs.rows),
    }
    for start, stop in RANGES:
        (rows,) = device_double.at(inputs.count(start, stop), (1,), np.int32)
        assert rows == len(range(start, min(stop, batch.num_tokens)))
    names = set(inputs.pointers) - set(COUNTS) - {"counts"}
    assert names == names_of(batch)
    for name in names:
        array = attrgetter(name)(batch)
        if len(array) or name.endswith("indptr"):
            found = device_double.at(inputs.pointers[name], array.shape, array.dtype)
            np.testing.assert_array_equal(found, array, name)
    for name, pointer in asdict(inputs.sampling).items():
        assert pointer == inputs.pointers[name if name == "num_samples" else f"sampling.{name}"]


def names_of(batch: Batch) -> set[str]:
    """Every array of a batch that is anything to the device; the slots of prompt log-probabilities are not."""
    own = {name for name in Batch.__slots__ if isinstance(getattr(batch, name), np.ndarray)}
    sampling = {f"sampling.{name}" for name in type(batch.sampling).__slots__}
    return own | sampling | {f"prompt_logprobs.{name}" for name in ("rows", "targets", "logprobs")}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1 << 30), waits=st.lists(st.booleans(), min_size=1, max_size=12))
def test_every_step_finds_its_batch(seed, waits):
    """Steps are enqueued as far ahead as the ring allows, and each checks its arrays when its turn comes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        device_double.install(monkeypatch, gpu_inputs)
        rng = np.random.default_rng(seed)
        inputs, checked = make(), []

        def kernel(batch: Batch) -> None:
            check(inputs, batch)
            checked.append(batch.step)

        for step, wait in enumerate(waits):
            batch = random_batch(rng, step, extras=bool(rng.random() < 0.5))
            inputs.upload(batch, 0)
            device_double.enqueue(lambda batch=batch: kernel(batch))
            if wait:
                device_double.finish()
        device_double.finish()
        assert checked == list(range(len(waits)))


def test_a_plain_step_is_one_copy_as_long_as_its_page_table(inputs):
    rng = np.random.default_rng(0)
    batch = random_batch(rng, 0, extras=False, full=True)
    inputs.upload(batch, 0)
    object.__setattr__(batch, "kv_indices", batch.kv_indices[:3])
    inputs.upload(batch, 0)
    full, short = device_double.COPIES
    assert full - short == 4 * (SEQS * MODEL_LEN // PAGE - 3)


def test_lists_of_a_step_do_not_reach_the_next(inputs):
    rng = np.random.default_rng(1)
    for step, extras in enumerate((True, False)):
        batch = random_batch(rng, step, extras=extras, full=True)
        inputs.upload(batch, 0)
        device_double.finish()
    check(inputs, batch)
    rows = device_double.at(inputs.sampling.bias_indptr, (SEQS + 1,), np.int32)
    assert not rows.any()


def test_the_most_a_step_can_have_fits(monkeypatch):
    device_double.install(monkeypatch, gpu_inputs)
    monkeypatch.setattr(gpu_inputs, "FIRST_EXTRAS", 1)  # staging has to grow
    wide = make()
    for name in ("bias_ids", "bias_values", "allowed_ids", "bad_words_ids", "bad_words_token_indptr"):
        per_row = {
            "allowed_ids": gpu_inputs.MAX_TOKEN_LIST,
            "bad_words_ids": gpu_inputs.MAX_BAD_WORD_TOKENS,
            "bad_words_token_indptr": gpu_inputs.MAX_BAD_WORDS * gpu_inputs.SPELLINGS,
        }
        count = SEQS * per_row.get(name, gpu_inputs.MAX_BIASES) + (name == "bad_words_token_indptr")
        batch = random_batch(np.random.default_rng(2), 0, extras=True, full=True)
        values = np.arange(count).astype(getattr(batch.sampling, name).dtype)
        object.__setattr__(batch.sampling, name, values)
        wide.upload(batch, 0)
        device_double.finish()
        check(wide, batch)
    wide.free()


def test_without_host_pages_all_else_goes_up(monkeypatch):
    device_double.install(monkeypatch, gpu_inputs)
    inputs = make(num_host_pages=0)
    batch = random_batch(np.random.default_rng(5), 0, extras=True, full=True)
    for name in ("swap_out", "swap_in"):
        object.__setattr__(batch, name, np.zeros((0, 2), np.int32))
    inputs.upload(batch, 0)
    device_double.finish()
    check(inputs, batch)
    inputs.free()


def test_whichever_allocation_fails_none_is_left(monkeypatch):
    device_double.install(monkeypatch, gpu_inputs)
    device_double.check_that_failures_leave_nothing(make)


def test_what_is_freed_keeps_no_page_of_the_host(monkeypatch):
    device_double.install(monkeypatch, gpu_inputs)
    inputs = make()
    views = [weakref.ref(view) for staging in inputs._ring for view in (staging.counts, *staging.views)]
    inputs.free()
    assert all(view() is None for view in views)


def test_staging_that_cannot_grow_leaves_nothing(monkeypatch):
    device_double.install(monkeypatch, gpu_inputs)
    monkeypatch.setattr(gpu_inputs, "FIRST_EXTRAS", 1)
    inputs = make()
    with device_double.memory_for(0):
        inputs.upload(random_batch(np.random.default_rng(6), 0, extras=True, full=True), 0)
    inputs.free()
    assert device_double.LIVE == []


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("token_ids", TOKENS),
        ("slots", SEQS),
        ("kv_indices", SEQS * MODEL_LEN // PAGE),
        ("sampling.rows", SEQS),
        ("swap_in", HOST_PAGES),
        ("forks", SEQS),
        ("sampling.allowed_ids", SEQS * gpu_inputs.MAX_TOKEN_LIST),
    ],
)
def test_more_than_fits_is_refused_before_it_is_copied(inputs, name, most):
    batch = random_batch(np.random.default_rng(3), 0, extras=True, full=True)
    part, _, field = name.rpartition(".")
    owner = getattr(batch, part) if part else batch
    array = getattr(owner, field)
    object.__setattr__(owner, field, np.concatenate([array[:1]] * (most + 1)))
    with pytest.raises((ValueError, AssertionError)):
        inputs.upload(batch, 0)


def test_an_empty_step(inputs):
    batch = random_batch(np.random.default_rng(4), 0, extras=False)
    for name in ("token_ids", "token_slots", "positions", "slots", "kv_lens", "last_page_len", "kv_indices"):
        object.__setattr__(batch, name, NO_IDS)
    for name in ("qo_indptr", "kv_indptr"):
        object.__setattr__(batch, name, indptr([]))
    object.__setattr__(batch, "sampling", sampling_batch([], [], []))
    inputs.upload(batch, 0)
    device_double.finish()
    check(inputs, batch)
