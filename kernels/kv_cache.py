"""The paged KV cache of one layer on the GPU: how it lies in memory, and the shapes that kernels are made for.

[num_pages, num_kv_heads, 2 (K, V), head_dim/64, page_size, 64] bf16, and in row r of a page, 128 bytes, the 16-byte
chunk c stands at chunk c ^ (r mod 8): the 128-byte swizzle of Hopper's matrix instructions, so that plain bulk copies
of whole pages land in shared memory as they are read there.
"""

from __future__ import annotations

from dataclasses import dataclass

from nf.errors import InputError

HEAD_DIMS = (64, 128)
PAGE_SIZES = (16, 32, 64)
MAX_GROUP = 8  # query heads per KV head: the columns of one mma in decode attention


def check_shape(num_heads: int, num_kv_heads: int, head_dim: int, page_size: int) -> None:
    """Raise InputError, naming the size, unless there are kernels for these heads and pages."""
    if head_dim not in HEAD_DIMS:
        raise InputError("head_dim", f"must be one of {HEAD_DIMS}, not {head_dim}")
    if page_size not in PAGE_SIZES:
        raise InputError("page_size", f"must be one of {PAGE_SIZES}, not {page_size}")
    if num_kv_heads <= 0 or num_heads % num_kv_heads or not 1 <= num_heads // num_kv_heads <= MAX_GROUP:
        raise InputError("num_heads", f"must be 1 to {MAX_GROUP} times num_kv_heads ({num_kv_heads}), not {num_heads}")


@dataclass(frozen=True, slots=True)
class PagedShape:
    """Heads and pages that a kernel over the cache is launched for.

    Raises:
        InputError: a size that no kernel was made for.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    def __post_init__(self) -> None:
        check_shape(self.num_heads, self.num_kv_heads, self.head_dim, self.page_size)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads
