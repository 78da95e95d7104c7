"""The budget of fast memory: bytes are taken before an allocation, and given back after it is
freed.

Low-bit pages, residuals, key scales, hot sets, read buffers, sliding windows and the working set of
a pass share one budget, so that their sum cannot exceed it. All sizes are in bytes. Spare bytes
(`claim_spare`) are for optional data: they are given up when others need them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from specache.errors import FastMemoryError
from specache.platform import forks


class SpareHolder(Protocol):
    """A holder of spare bytes."""

    def give_up(self, size: int) -> None:
        """Release spare claims of at least `size` bytes, or all of them."""


class ByteBudget:
    """A limited number of bytes; with a `limit` of None it only counts.

    Attributes:
        used: bytes held now.
        working: the part of `used` that `reserved` blocks hold, such as working sets of passes.
        peak: largest value of `used`.
        spare: spare bytes held in addition; not part of `used` and `peak`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0
        self.working = 0
        self.peak = 0
        self.spare = 0
        self._holders: weakref.WeakSet[SpareHolder] = weakref.WeakSet()
        self._lock = forks.reentrant_lock()  # claims may be garbage-collected on any thread

    @property
    def left(self) -> int | None:
        """Return the bytes that can still be taken; None without a limit."""
        return None if self.limit is None else max(0, self.limit - self.used)

    def take(self, size: int, what: str) -> None:
        """Count `size` more bytes for `what` (a plural, for the message).

        Raises:
            FastMemoryError: the limit does not allow it; nothing was counted.
        """
        with self._lock:
            if size > 0 and self.limit is not None and self.used + size > self.limit:
                raise FastMemoryError(
                    f"With {size:,} bytes more for {what}, fast memory needs {self.used + size:,} bytes but fast_memory allows "
                    f"{self.limit:,}. Raise fast_memory, use fewer bits, a smaller top_k, hot_set or prefill_chunk, or a shorter "
                    "context; `specache plan` says how much each of them needs."
                )
            self._make_room(size)
            self.used += size
            self.peak = max(self.peak, self.used)

    def give_back(self, size: int) -> None:
        with self._lock:
            self.used -= size

    def claim(self, size: int, what: str) -> Claim:
        """Return a resizable claim of one holder. Raise as `take`."""
        return Claim(self, size, what)

    def claim_spare(self, size: int, holder: SpareHolder) -> SpareClaim | None:
        """Return a claim of spare bytes that `holder` gives up on demand.

        Return None if there is no room.
        """
        with self._lock:
            if self.limit is not None and self.used + self.spare + size > self.limit:
                return None
            self._holders.add(holder)
            return SpareClaim(self, size)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Block other threads from taking bytes inside the block, so that no holder has to give any
        up.
        """
        with self._lock:
            yield

    def count_spare(self, size: int) -> None:
        with self._lock:
            self.spare += size

    def _count_working(self, size: int) -> None:
        with self._lock:
            self.working += size

    def _make_room(self, size: int) -> None:
        """Have spare bytes given up if `size` more bytes do not fit beside them."""
        if self.limit is None or size <= 0:
            return
        for holder in list(self._holders):
            short = self.used + self.spare + size - self.limit
            if short <= 0:
                return
            holder.give_up(short)

    @contextmanager
    def reserved(self, size: int, what: str) -> Iterator[None]:
        """Hold `size` bytes inside the block. Raise as `take`."""
        self.take(size, what)
        self._count_working(size)
        try:
            yield
        finally:
            self._count_working(-size)
            self.give_back(size)


class Claim:
    """Bytes that one holder keeps of a budget, until `release` or until the claim is
    garbage-collected.
    """

    def __init__(self, budget: ByteBudget, size: int, what: str) -> None:
        self.size = 0
        self.budget = budget
        self._what = what
        self.resize(size)

    def resize(self, size: int) -> None:
        """Hold `size` bytes from now on.

        Raises:
            FastMemoryError: the limit does not allow it; the claim is unchanged.
        """
        if size != self.size:
            self.budget.take(size - self.size, self._what)
            self.size = size

    def release(self) -> None:
        self.resize(0)

    def __del__(self) -> None:
        self.release()


class SpareClaim:
    """Spare bytes that one holder keeps of a budget, until `release` or until the claim is
    garbage-collected.
    """

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self.size = size
        self._budget = budget
        budget.count_spare(size)

    def release(self) -> None:
        size, self.size = self.size, 0
        self._budget.count_spare(-size)

    def __del__(self) -> None:
        self.release()
