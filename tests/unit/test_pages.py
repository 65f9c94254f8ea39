"""PagePool against a naive model: a dictionary of reference counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf.scheduler.pages import PagePool, pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 16) == pages


@settings(max_examples=60, deadline=None)
@given(
    num_pages=st.integers(0, 30),
    calls=st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 2**32)), max_size=60),
)
def test_pool_equals_a_dictionary(num_pages: int, calls: list[tuple[str, int]]) -> None:
    pool, model = PagePool(num_pages), Counter[int]()
    for call, seed in calls:
        rng = np.random.default_rng(seed)
        references = np.array(sorted(model.elements()), np.int32)
        if call == "allocate":
            pages = pool.allocate(int(rng.integers(pool.num_free + 1)))
            assert len(set(pages.tolist())) == len(pages)
            assert not model.keys() & set(pages.tolist()), "a page in use was handed out"
            model.update(pages.tolist())
        elif call == "retain" and len(references):
            pages = rng.choice(references, 5)
            pool.retain(pages)
            model.update(pages.tolist())
        elif call == "release":
            pages = rng.permutation(references)[: rng.integers(len(references) + 1)]  # several of one page's, maybe
            pool.release(pages)
            model -= Counter(pages.tolist())
        pool.check()
        assert pool.num_used == len(model)
        assert {int(p): int(pool.refcount[p]) for p in np.flatnonzero(pool.refcount)} == dict(model)
    pool.release(np.array(list(model.elements()), np.int32))
    assert pool.num_free == num_pages


def test_misuse_is_an_assertion() -> None:
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        pool.allocate(3)
    page = pool.allocate(1)
    pool.release(page)
    with pytest.raises(AssertionError, match="more often than taken"):
        pool.release(page)
    with pytest.raises(AssertionError, match="cannot be shared"):
        PagePool(1).retain(np.array([0], np.int32))
