"""Positioned reads into memory: the interface `Reader` and its implementations.

`probe` measures which one a folder gets.

- `io_uring` submits a batch to the kernel in one call.
- `threads` reads in parallel with a thread pool. Both bypass the page cache where the file system
  allows.
- `buffered` reads one after the other through the page cache and drops the pages it read.

To add a reader, write a class with the members of `Reader` and add it to `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specache.platform import forks
from specache.tiers.disk import aligned_io
from specache.tiers.disk.aligned_io import AlignedBuffer, BufferPool
from specache.tiers.disk.native_reads import RING_ENTRIES, NativeRows

Index = NDArray[np.int64]

THREADS = 8  # reads in flight at once
_TRIES = 3  # short direct reads at one place before the end of the file is accepted
_SHARE = 2  # fewest reads per thread: smaller shares are not worth a hand-over


@dataclass(frozen=True)
class ReadBatch:
    """Reads into one buffer: `lengths` bytes at `offsets` of open files `fds`, to `starts` in the
    buffer; int64 [n] each.

    With direct I/O, offsets, lengths and starts are aligned.
    """

    buffer: AlignedBuffer
    fds: Index
    offsets: Index
    starts: Index
    lengths: Index

    def __len__(self) -> int:
        return len(self.fds)

    def split(self, limit: int) -> ReadBatch:
        """Return the same reads, none longer than `limit`."""
        parts = -(-self.lengths // limit)
        if len(parts) == 0 or parts.max() == 1:
            return self
        within = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # index of a part within its read
        done = within * limit
        lengths = np.minimum(np.repeat(self.lengths, parts) - done, limit)
        fds, offsets, starts = (np.repeat(values, parts) for values in (self.fds, self.offsets, self.starts))
        return ReadBatch(self.buffer, fds, offsets + done, starts + done, lengths)


class ReadFailedError(Exception):
    """A read that could not be completed.

    Attributes:
        fd: the file.
        reached: its first byte that was not read.
        cause: None if the file ends there.
    """

    def __init__(self, fd: int, reached: int, cause: OSError | None) -> None:
        super().__init__("the file ends there" if cause is None else str(cause))
        self.fd = fd
        self.reached = reached
        self.cause = cause


class Reader(Protocol):
    """Completes batches of reads; may be called from several threads."""

    name: str
    direct: bool  # files must be opened to bypass the page cache
    alignment: int  # bytes; offsets and lengths must be multiples of it
    buffers: BufferPool
    native: NativeRows | None  # gathers scattered rows in one call

    def read(self, batch: ReadBatch) -> None:
        """Complete all reads.

        Raises:
            ReadFailedError: a read failed; none is running any more.
        """

    def close(self, wait: bool = True) -> None:
        """End the reader's threads, waiting for them if `wait`."""


class BufferedReader:
    """Reads one after the other through the page cache and drops the pages."""

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
    """Reads in parallel. The calling thread takes a share, so a single read needs no hand-over."""

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
            _wait(others)  # also if this share failed: the memory may not be written after we return
        for other in others:
            other.result()

    def close(self, wait: bool = True) -> None:
        self._executor.shutdown(wait=wait, cancel_futures=True)


class RingReader:
    """Reads a whole batch in one system call (Linux's io_uring), in C++.

    Raises:
        OSError: there is no C++ extension, or the kernel has no io_uring or forbids it.
    """

    name = "io_uring"

    def __init__(self, direct: bool, alignment: int) -> None:
        self.direct = direct
        self.alignment = alignment
        self.buffers = BufferPool()
        self.native: NativeRows | None = NativeRows(RING_ENTRIES)

    def read(self, batch: ReadBatch) -> None:
        addresses = batch.starts + batch.buffer.address
        # no name for `native` here: the frames of an error would keep its rings open
        if not (self.native and self.native.read(batch.fds, batch.offsets, addresses, batch.lengths)):
            _complete(batch, slice(None), self)  # read it plainly, which reports an error

    def close(self, wait: bool = True) -> None:
        self.native = None


READERS: dict[str, Callable[[bool, int], Reader]] = {
    "io_uring": RingReader,
    "threads": ThreadReader,
    "buffered": BufferedReader,
}


def _wait(futures: list[Future[None]]) -> None:
    """Wait until no future is running, also if interrupted."""
    try:
        wait(futures)
    except BaseException:  # Ctrl-C
        _wait(futures)
        raise


def _complete(batch: ReadBatch, which: slice, reader: Reader) -> None:
    """Perform some reads of a batch one after the other, continuing after short ones."""
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
        done = reached if reached == len(into) else reached // unit * unit  # direct I/O continues at an aligned offset
        stuck = stuck + 1 if count < unit else 0
        if count == 0 or stuck == _TRIES:
            raise ReadFailedError(fd, offset + reached, None)


_leased: dict[tuple[str, bool, int], Reader] = {}
_users: dict[Reader, int] = {}
_lock = forks.reentrant_lock()  # a finalizer may release in the middle of a lease


def lease(name: str, direct: bool, alignment: int) -> Reader:
    """Return the process's shared reader of this kind; return it with `release`.

    Raises:
        OSError: the reader is not available here.
    """
    key = (name, direct, alignment)
    with _lock:
        if key not in _leased:
            _leased[key] = READERS[name](direct, alignment)
        return share(_leased[key])


def share(reader: Reader) -> Reader:
    """Add a user to a leased reader. Each user calls `release`."""
    with _lock:
        _users[reader] = _users.get(reader, 0) + 1
        return reader


def release(reader: Reader, wait: bool = True) -> None:
    """Remove a user of a reader. The last one ends its threads.

    One of the process that this one was forked from is left as it is.
    """
    with _lock:
        if reader not in _users:
            return
        _users[reader] -= 1
        if _users[reader]:
            return
        del _users[reader], _leased[reader.name, reader.direct, reader.alignment]
    reader.close(wait)


@forks.in_child
def _leave_to_parent() -> None:
    """Have a forked process lease readers of its own.

    Threads stay behind in its parent, and both would write to the same buffers, which are shared
    mappings: with private ones a direct read during a fork could arrive in the wrong process.
    """
    _leased.clear()
    _users.clear()
