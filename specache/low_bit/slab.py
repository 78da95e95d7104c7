"""Slabs: memory that is divided into pages."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor


class Slab:
    """`pages` pages, all zero at first.

    On the CPU a slab is a lazy anonymous mapping: unused pages take no memory, and free pages can
    return to the system. It is outside the heap, which can therefore shrink when temporaries are
    freed. Elsewhere a slab is a plain tensor.
    """

    def __init__(self, pages: int, page_bytes: int, device: torch.device) -> None:
        self.pages = pages
        self._page_bytes = page_bytes
        self._mapping: mmap.mmap | None = None
        if self.is_lazy(device):
            self._mapping = mmap.mmap(-1, pages * page_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.data: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8).unflatten(0, (pages, page_bytes))
        else:
            self.data = torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)

    @staticmethod
    def is_lazy(device: torch.device) -> bool:
        """Return whether slabs on `device` are lazy: on a CPU with `MADV_DONTNEED`."""
        return device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED")

    def give_back(self, free: Iterable[int]) -> None:
        """Return free pages (their numbers) to the system, as far as they fill its own pages."""
        if self._mapping is None:
            return
        for _, run in groupby(enumerate(sorted(free)), key=lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in run]
            start = -(-numbers[0] * self._page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (numbers[-1] + 1) * self._page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)
