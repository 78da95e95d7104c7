"""Slabs: memory that is divided into pages."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86 and with ARM's pages of 4 KiB


class Slab:
    """`pages` pages, all zero at first.

    On the CPU a slab is a lazy anonymous mapping: unused pages take no memory, and free pages can
    return to the system. It is outside the heap, which can therefore shrink when temporaries are
    freed. Where the system has huge pages it asks for whole ones, so that a step that reads the
    slab looks up fewer addresses. Elsewhere a slab is a plain tensor.
    """

    def __init__(self, pages: int, page_bytes: int, device: torch.device) -> None:
        self.pages = pages
        self._page_bytes = page_bytes
        self._mapping: mmap.mmap | None = None
        if self.is_lazy(device):
            size = pages * page_bytes
            room = -(-size // HUGE_PAGE) * HUGE_PAGE if size > HUGE_PAGE else size  # Linux aligns whole ones
            self._mapping = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.data: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, count=size).unflatten(0, (pages, page_bytes))
            self._ask_for_huge_pages()
        else:
            self.data = torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)

    def _ask_for_huge_pages(self) -> None:
        """Advise the system to back the huge pages that lie wholly in the mapping by real ones."""
        if self._mapping is None or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        address, size = self.data.data_ptr(), self.data.nbytes
        start, stop = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
        if start < stop:
            with suppress(OSError):  # a system without them
                self._mapping.madvise(mmap.MADV_HUGEPAGE, start - address, stop - start)

    @staticmethod
    def is_lazy(device: torch.device) -> bool:
        """Return whether slabs on `device` are lazy: on a CPU with `MADV_DONTNEED`."""
        return device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED")

    def give_back(self, free: Iterable[int]) -> None:
        """Return free pages (their numbers) to the system, as far as they fill its own pages."""
        if self._mapping is None:
            return
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # or the system would fill the gaps again to make huge pages
            with suppress(OSError):
                self._mapping.madvise(mmap.MADV_NOHUGEPAGE)
        for _, run in groupby(enumerate(sorted(free)), key=lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in run]
            start = -(-numbers[0] * self._page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (numbers[-1] + 1) * self._page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)
