"""Positioned reads into memory: one interface, and the ways of doing it. Which one a folder gets is measured (`probe`).

`io_uring` hands the kernel a whole batch in one call; `threads` reads in parallel from a pool of threads. Both go past the page
cache where the file system can. `buffered` reads one after the other through the page cache and drops what it read from it. A
further reader is a class with the members of `Reader` and a line in `READERS`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specache.tiers.disk import aligned_io
from specache.tiers.disk.aligned_io import AlignedBuffer, BufferPool
from specache.tiers.disk.native_reads import NativeRows
from specache.tiers.disk.uring import Ring

Index = NDArray[np.int64]

THREADS = 8  # reads in flight at once
RING_ENTRIES = 128  # reads of a batch that the kernel gets at once
_TRIES = 3  # direct reads that end within the device's unit before the file is believed to end there
_SHARE = 2  # reads that are not worth handing to another thread


@dataclass(frozen=True)
class ReadBatch:
    """Reads into one buffer: `lengths` bytes at `offsets` of open files `fds`, to `starts` in the buffer; int64 [n] each.

    With direct I/O offsets, lengths and starts are aligned.
    """

    buffer: AlignedBuffer
    fds: Index
    offsets: Index
    starts: Index
    lengths: Index

    def __len__(self) -> int:
        return len(self.fds)

    def split(self, limit: int) -> ReadBatch:
        """The same with no read longer than `limit`."""
        parts = -(-self.lengths // limit)
        if len(parts) == 0 or parts.max() == 1:
            return self
        within = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # number of a part in its read
        done = within * limit
        lengths = np.minimum(np.repeat(self.lengths, parts) - done, limit)
        fds, offsets, starts = (np.repeat(values, parts) for values in (self.fds, self.offsets, self.starts))
        return ReadBatch(self.buffer, fds, offsets + done, starts + done, lengths)


class ReadFailedError(Exception):
    """A read that could not be completed.

    Attributes:
        fd, reached: the file and its first byte that is missing.
        cause: `None` if the file ends there.
    """

    def __init__(self, fd: int, reached: int, cause: OSError | None) -> None:
        super().__init__("the file ends there" if cause is None else str(cause))
        self.fd = fd
        self.reached = reached
        self.cause = cause


class Reader(Protocol):
    """Completes batches of reads; may be called from several threads."""

    name: str
    direct: bool  # files are to be opened past the page cache
    alignment: int  # bytes: what offsets and lengths must be multiples of
    buffers: BufferPool
    native: NativeRows | None  # gathers scattered rows at once

    def read(self, batch: ReadBatch) -> None:
        """Complete all reads.

        Raises:
            ReadFailedError: one failed; none of them is running any more.
        """

    def close(self, wait: bool = True) -> None:
        """End its threads, waiting for them if `wait`."""


class BufferedReader:
    """One read after the other, through the page cache, which is not left full."""

    name = "buffered"

    def __init__(self, direct: bool, alignment: int) -> None:
        self.direct = direct
        self.alignment = alignment
        self.buffers = BufferPool()
        self.native: NativeRows | None = None

    def read(self, batch: ReadBatch) -> None:
        _complete(batch, slice(None), self)

    def close(self, wait: bool = True) -> None:
        pass


class ThreadReader:
    """Reads in parallel. The calling thread takes its share, so that a single read costs no hand-over."""

    name = "threads"

    def __init__(self, direct: bool, alignment: int) -> None:
        self.direct = direct
        self.alignment = alignment
        self.buffers = BufferPool()
        self.native: NativeRows | None = None
        self._executor = ThreadPoolExecutor(THREADS - 1, thread_name_prefix="specache-read")

    def read(self, batch: ReadBatch) -> None:
        shares = max(1, min(THREADS, -(-len(batch) // _SHARE)))
        others: list[Future[None]] = []
        try:
            for i in range(1, shares):
                others.append(self._executor.submit(_complete, batch, slice(i, None, shares), self))
            _complete(batch, slice(0, None, shares), self)
        finally:
            _wait(others)  # also when this share failed: the memory may not be written after we return
        for other in others:
            other.result()

    def close(self, wait: bool = True) -> None:
        self._executor.shutdown(wait=wait, cancel_futures=True)


class RingReader:
    """A whole batch in one system call (Linux's io_uring).

    Raises:
        OSError: the kernel has no io_uring, or forbids it.
    """

    name = "io_uring"

    def __init__(self, direct: bool, alignment: int) -> None:
        self.direct = direct
        self.alignment = alignment
        self.buffers = BufferPool()
        self.native: NativeRows | None = None
        with contextlib.suppress(OSError):
            self.native = NativeRows(RING_ENTRIES)
        self._lock = threading.Lock()
        self._idle = [Ring(RING_ENTRIES)]  # each serves one batch at a time
        self._closed = False

    def read(self, batch: ReadBatch) -> None:
        with self._ring() as ring:
            for first in range(0, len(batch), RING_ENTRIES):
                part = slice(first, first + RING_ENTRIES)
                lengths = batch.lengths[part]
                got = np.zeros_like(lengths)
                with contextlib.suppress(OSError):
                    if ring is not None:
                        addresses = batch.starts[part] + batch.buffer.address
                        got = ring.read(batch.fds[part], batch.offsets[part], addresses, lengths)
                for i in (first + np.flatnonzero(got != lengths)).tolist():
                    _complete(batch, slice(i, i + 1), self)  # short or failed: ask in the plain way, and say what is wrong

    def close(self, wait: bool = True) -> None:
        with self._lock:
            rings, self._idle, self._closed, self.native = self._idle, [], True, None
        for ring in rings:
            ring.close()

    @contextlib.contextmanager
    def _ring(self) -> Iterator[Ring | None]:
        """A ring that nobody else uses; `None` where the system has no room for another."""
        with self._lock:
            ring = self._idle.pop() if self._idle else None
        if ring is None:
            with contextlib.suppress(OSError):
                ring = Ring(RING_ENTRIES)
        try:
            yield ring
        finally:
            with self._lock:
                if ring is not None and not self._closed:
                    self._idle.append(ring)
                    ring = None
            if ring is not None:
                ring.close()


READERS: dict[str, Callable[[bool, int], Reader]] = {
    "io_uring": RingReader,
    "threads": ThreadReader,
    "buffered": BufferedReader,
}


def _wait(futures: list[Future[None]]) -> None:
    """Wait until none of them runs any more, also when interrupted."""
    try:
        wait(futures)
    except BaseException:  # Ctrl-C
        _wait(futures)
        raise


def _complete(batch: ReadBatch, which: slice, reader: Reader) -> None:
    """Some reads of a batch one after the other, asking again after short ones."""
    values = (batch.fds, batch.offsets, batch.starts, batch.lengths)
    for fd, offset, start, length in zip(*(value[which].tolist() for value in values), strict=True):
        _fill(batch.buffer.bytes[start : start + length], fd, offset, reader.alignment if reader.direct else 1)
        if not reader.direct:
            aligned_io.drop_cached(fd, offset, length)


def _fill(into: memoryview, fd: int, offset: int, unit: int) -> None:
    done, stuck = 0, 0
    while done < len(into):
        try:
            count = aligned_io.read_at(fd, into[done:], offset + done)
        except OSError as error:
            raise ReadFailedError(fd, offset + done, error) from error
        reached = done + count
        done = reached if reached == len(into) else reached // unit * unit  # direct I/O goes on from an aligned place
        stuck = stuck + 1 if count < unit else 0
        if count == 0 or stuck == _TRIES:
            raise ReadFailedError(fd, offset + reached, None)


_leased: dict[tuple[str, bool, int], Reader] = {}
_users: dict[Reader, int] = {}
_lock = threading.RLock()  # a finalizer may release in the middle of a lease


def lease(name: str, direct: bool, alignment: int) -> Reader:
    """The process's reader of this kind; give it back with `release`.

    Raises:
        OSError: it cannot be had here.
    """
    key = (name, direct, alignment)
    with _lock:
        if key not in _leased:
            _leased[key] = READERS[name](direct, alignment)
        return share(_leased[key])


def share(reader: Reader) -> Reader:
    """A leased reader for one more user, who gives it back with `release`."""
    with _lock:
        _users[reader] = _users.get(reader, 0) + 1
        return reader


def release(reader: Reader, wait: bool = True) -> None:
    """Give a reader back; the last user's ends its threads."""
    with _lock:
        _users[reader] -= 1
        if _users[reader]:
            return
        del _users[reader], _leased[reader.name, reader.direct, reader.alignment]
    reader.close(wait)
