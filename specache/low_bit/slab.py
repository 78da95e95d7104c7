"""Slabs: memory that is divided into pages."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy
import torch
from torch import Tensor

from specache.platform.mapped_memory import ask_for_huge_pages, new_mapping


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
            self._mapping = new_mapping(size)
            self.data: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, count=size).unflatten(0, (pages, page_bytes))
            ask_for_huge_pages(self._mapping, self.data.data_ptr(), size)
        else:
            self.data = torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)

    @staticmethod
    def is_lazy(device: torch.device) -> bool:
        """Return whether slabs on `device` are lazy: on a CPU with `MADV_DONTNEED`."""
        return device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED")

    def give_back(self, free: Sequence[int]) -> None:
        """Return free pages (their numbers) to the system, as far as they fill its own pages."""
        if self._mapping is None:
            return
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # or the system would fill the gaps again to make huge pages
            with suppress(OSError):
                self._mapping.madvise(mmap.MADV_NOHUGEPAGE)
        numbers = numpy.sort(numpy.array(free, numpy.int64))
        for run in numpy.split(numbers, numpy.flatnonzero(numpy.diff(numbers) != 1) + 1):
            if not len(run):
                continue
            first, last = int(run[0]), int(run[-1])
            start = -(-first * self._page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (last + 1) * self._page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)
