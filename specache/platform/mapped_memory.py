"""Anonymous memory straight from the system, in huge pages where it has them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86 and with ARM's pages of 4 KiB
ALIGNMENT = 64  # a line of the processor's caches
CHUNK = 64 << 20  # bytes that an arena maps at a time; what is not touched takes no memory


def new_mapping(size: int) -> mmap.mmap:
    """Return a lazy private mapping of at least `size` bytes, all zero."""
    room = -(-size // HUGE_PAGE) * HUGE_PAGE if size > HUGE_PAGE else size  # Linux aligns whole ones
    return mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def ask_for_huge_pages(mapping: mmap.mmap, address: int, size: int) -> None:
    """Advise the system to back the huge pages that lie wholly in a mapping by real ones.

    Args:
        address, size: of the mapping.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start, stop = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
    if start < stop:
        with suppress(OSError):  # a system without them
            mapping.madvise(mmap.MADV_HUGEPAGE, start - address, stop - start)


class Arena:
    """CPU memory for tensors that are read one after the other: they lie in the order of `empty`.

    A processor that reads ahead of a tensor's end then reads what is wanted next, and it looks up
    fewer addresses. Each tensor has a storage of its own. Memory is freed with the last tensor of a
    chunk.
    """

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._used = self._size = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new tensor, all zero."""
        count = math.prod(shape)
        if not hasattr(mmap, "MAP_ANONYMOUS") or not count:
            return torch.zeros(*shape, dtype=dtype, device="cpu")
        size = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self._mapping is None or self._used + size > self._size:
            self._used, self._size = 0, max(size, CHUNK)
            self._mapping = new_mapping(self._size)
            whole = torch.frombuffer(self._mapping, dtype=torch.uint8)
            ask_for_huge_pages(self._mapping, whole.data_ptr(), self._size)
        tensor = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=self._used)
        self._used += size
        return tensor.view(*shape)
