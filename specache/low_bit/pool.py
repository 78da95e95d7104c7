"""A page pool with a byte budget, and page tables.

Appending never copies pages, freeing is immediate, and sequences that share a prefix share its
pages by reference counts.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise

import torch
from torch import Tensor

from specache.config import PAGE_TOKENS, Code
from specache.kernels.types import LowBitKV, PageRun
from specache.low_bit.layout import PageLayout
from specache.low_bit.slab import Slab
from specache.platform import forks
from specache.platform.budget import ByteBudget

Page = tuple[int, int]  # (slab, index in the slab)

SLAB_BYTES = 8 << 20  # least size of a lazy slab: a few huge pages, of which one at most is partly used


class PagePool:
    """Fixed-size pages of one layout, in slabs that are allocated as needed.

    Args:
        layout: the layout of every page.
        device: the device of the pages (fast memory).
        budget: bounds the bytes of pages.
    """

    def __init__(self, layout: PageLayout, device: torch.device, budget: ByteBudget) -> None:
        self.layout = layout
        self.device = device
        self.budget = budget
        self._lazy = Slab.is_lazy(device)
        self._slabs: dict[int, Slab] = {}
        self._free: dict[int, list[int]] = {}
        self._references: dict[Page, int] = {}
        self._next_slab = 0
        self._lock = forks.lock()
        self._forgotten: deque[list[Page]] = deque()  # pages of finalized tables, not released yet

    @property
    def pages_in_use(self) -> int:
        return len(self._references)

    def allocate(self, count: int) -> list[Page]:
        """Allocate `count` pages with one reference each, free ones first.

        Raises:
            FastMemoryError: the budget does not allow it; nothing was allocated.
        """
        with self._changing():
            pages = list(islice(self._available(), count))
            missing = count - len(pages)
            self.budget.take((count if self._lazy else missing) * self.layout.page_bytes, "pages of the low-bit copy")
            if missing:
                pages += [(self._next_slab, index) for index in range(missing)]
                self._add_slab(missing)
            for page in pages:
                self._free[page[0]].pop()
                self._references[page] = 1
            return sorted(pages)

    def share(self, pages: list[Page]) -> None:
        """Add a reference to each page."""
        with self._changing():
            for page in pages:
                self._references[page] += 1

    def release(self, pages: list[Page]) -> None:
        """Remove a reference to each page. A slab without pages in use returns to the system."""
        with self._changing():
            self._release(pages)

    def forget(self, pages: list[Page]) -> None:
        """`release` for a finalizer: never waits for the lock, because it may run at any point."""
        self._forgotten.append(pages)
        self._release_forgotten()

    def is_shared(self, page: Page) -> bool:
        return self._references[page] > 1

    def run(self, slab: int, first: int, count: int) -> PageRun:
        return self.layout.run(self._slabs[slab].data, first, count)

    def page_bytes(self, page: Page) -> Tensor:
        """Return the raw bytes of one page, uint8 [page_bytes], a view."""
        return self._slabs[page[0]].data[page[1]]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock inside the block; then release pages that finalizers forgot meanwhile."""
        try:
            with self._lock:
                yield
        finally:
            self._release_forgotten()

    def _release_forgotten(self) -> None:
        while self._forgotten and self._lock.acquire(blocking=False):
            try:
                while self._forgotten:
                    self._release(self._forgotten.popleft())
            finally:
                self._lock.release()

    def _release(self, pages: list[Page]) -> None:
        freed: dict[int, int] = {}
        for page in pages:
            self._references[page] -= 1
            if self._references[page]:
                continue
            del self._references[page]
            slab, index = page
            self._free[slab].append(index)
            freed[slab] = freed.get(slab, 0) + 1
        for slab, count in freed.items():
            held = self._slabs[slab]
            empty = len(self._free[slab]) == held.pages
            self.budget.give_back((count if self._lazy else held.pages * empty) * self.layout.page_bytes)
            if empty:
                del self._free[slab], self._slabs[slab]
            elif self._lazy:
                held.give_back(self._free[slab])

    def _available(self) -> Iterator[Page]:
        """Yield free pages as they are popped, those of the emptiest slabs first."""
        for slab in sorted(self._free, key=lambda s: len(self._free[s]), reverse=True):
            for index in reversed(self._free[slab]):
                yield slab, index

    def _add_slab(self, missing: int) -> None:
        pages = max(missing, SLAB_BYTES // self.layout.page_bytes) if self._lazy else missing
        self._slabs[self._next_slab] = Slab(pages, self.layout.page_bytes, self.device)
        self._free[self._next_slab] = list(reversed(range(pages)))
        self._next_slab += 1


class PageTable:
    """The pages of one layer of one sequence, in token order, and the number of tokens in them.

    The pages return to the pool when the table is garbage.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: list[Page] = []  # always changed in place: the finalizer refers to it
        self.length = 0
        self.unchanged = 0  # tokens at the last `mark` that were not truncated since
        self.version = 0  # changes before the pages do
        self._runs: tuple[PageRun, ...] | None = None
        weakref.finalize(self, pool.forget, self.pages).atexit = False

    @property
    def nbytes(self) -> int:
        return len(self.pages) * self.pool.layout.page_bytes

    @property
    def code(self) -> Code:
        return self.pool.layout.code

    def extend(self, tokens: int) -> None:
        """Make room for `tokens` more tokens and count them. The caller writes their codes."""
        self._own_last_page()
        missing = _pages_for(self.length + tokens) - len(self.pages)
        if missing > 0:
            self._pages_change()
            self.pages += self.pool.allocate(missing)
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Drop tokens from `length` on. Pages without tokens return to the pool."""
        self._pages_change()
        keep = _pages_for(length)
        gone = self.pages[keep:]
        del self.pages[keep:]  # before `release`: an interrupt in between must not release a page twice
        self.pool.release(gone)
        self.length = length
        self.unchanged = min(self.unchanged, length)

    def mark(self) -> None:
        """Start to track in `unchanged` how many of the current tokens stay."""
        self.unchanged = self.length

    def raw(self, start: int, stop: int) -> Tensor:
        """Return a copy of the bytes of pages `[start, stop)`, uint8 [stop - start, page bytes]."""
        empty = torch.empty(0, self.pool.layout.page_bytes, dtype=torch.uint8)
        return torch.stack([self.pool.page_bytes(page) for page in self.pages[start:stop]]).cpu() if stop > start else empty

    def set_raw(self, start: int, data: Tensor) -> None:
        """Write `data` from `raw` into the pages from `start` on. They must not be shared."""
        for page, row in zip(self.pages[start : start + len(data)], data, strict=True):
            self.pool.page_bytes(page).copy_(row)

    def copy_pages(self, source: PageTable) -> None:
        """Overwrite the pages, which must not be shared, with those of a table of as many."""
        for mine, first, theirs, other, count in _common_runs(self._consecutive(), source._consecutive()):
            into, data = self.pool._slabs[mine].data, source.pool._slabs[theirs].data
            into[first : first + count].copy_(data[other : other + count])

    def fork(self) -> PageTable:
        """Return a second table over the same pages. Pages are copied on write."""
        other = PageTable(self.pool)
        self.pool.share(self.pages)
        other.pages += self.pages
        other.length = self.length
        return other

    def low_bit_kv(self, channel_scales: Tensor | None = None) -> LowBitKV:
        """Return the low-bit copy for kernels."""
        if self._runs is None:
            self._runs = tuple(self.pool.run(*run) for run in self._consecutive())
        return self.pool.layout.low_bit_kv(self._runs, self.length, channel_scales)

    def _pages_change(self) -> None:
        """Forget what was computed from the pages, before they change: an interrupt may follow."""
        self._runs = None
        self.version += 1

    def _own_last_page(self) -> None:
        """Copy a partly filled last page that is shared, before it is written to."""
        if self.length % PAGE_TOKENS and self.pool.is_shared(self.pages[-1]):
            self._pages_change()
            (page,) = self.pool.allocate(1)
            self.pool.page_bytes(page).copy_(self.pool.page_bytes(self.pages[-1]))
            self.pool.release([self.pages[-1]])
            self.pages[-1] = page

    def _consecutive(self) -> list[tuple[int, int, int]]:
        """Return runs of neighbouring pages as (slab, first, count)."""
        if not self.pages:
            return []
        starts = [0] + [i + 1 for i, ((s, p), (t, q)) in enumerate(pairwise(self.pages)) if (s, p + 1) != (t, q)]
        return [(*self.pages[i], j - i) for i, j in pairwise([*starts, len(self.pages)])]


def _common_runs(mine: list[tuple[int, int, int]], theirs: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (slab, first, other slab, its first, count) of stretches that are runs in both."""
    left, right = list(reversed(mine)), list(reversed(theirs))
    while left:
        (slab, first, some), (other, start, more) = left.pop(), right.pop()
        count = min(some, more)
        yield slab, first, other, start, count
        left += [(slab, first + count, some - count)] if some > count else []
        right += [(other, start + count, more - count)] if more > count else []


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)
