"""PagePool: which KV pages are free and how many sequences read each of the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold ``num_tokens`` tokens."""
    return -(-num_tokens // page_size)


class PagePool:
    """Pages 0 … num_pages-1 with reference counts; every call handles many pages at once.

    The free pages are the first ``num_free`` entries of a stack, so taking and giving back are slices. A page that is
    released may be handed out by the very next ``allocate``: steps run in order, so the next writer comes later.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.refcount: Int32 = np.zeros(num_pages, np.int32)
        self._stack: Int32 = np.arange(num_pages, dtype=np.int32)[::-1].copy()  # page 0 is on top

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> Int32:
        """Take ``count`` pages, int32 [count], each with one reference. The caller has checked ``num_free``."""
        assert 0 <= count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        top = self.num_free
        pages = self._stack[top - count : top][::-1].copy()
        self.num_free = top - count
        self.refcount[pages] = 1
        return pages

    def retain(self, pages: Int32) -> None:
        """Add one reference per entry of ``pages``; an entry may repeat."""
        assert (self.refcount[pages] > 0).all(), "a free page cannot be shared"
        np.add.at(self.refcount, pages, 1)

    def release(self, pages: Int32) -> None:
        """Drop one reference per entry of ``pages``; an entry may repeat. Pages without references become free."""
        np.subtract.at(self.refcount, pages, 1)
        left = self.refcount[pages]
        assert (left >= 0).all(), "a page was released more often than taken"
        freed = np.unique(pages[left == 0])
        self._stack[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def check(self) -> None:
        """Assert that every page is either free or referenced, and free only once."""
        free = np.sort(self._stack[: self.num_free])
        assert np.array_equal(free, np.flatnonzero(self.refcount == 0)), "free pages and reference counts disagree"
