"""System calls of the disk tier: open, positioned reads and writes, direct I/O, aligned memory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from specache.platform import forks

DEFAULT_ALIGNMENT = 4096  # bytes, where the system reports none: no device in use needs more
_KEPT_BUFFERS = 5  # one per thread that reads at a time
_BUFFER_UNIT = 64 << 10  # bytes; sizes are rounded up, so that a buffer also fits a slightly longer read
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_AT_EMPTY_PATH = 0x1000


def read_at(fd: int, into: memoryview, offset: int) -> int:
    """Read once at `offset` and return the number of bytes read, 0 at the end of the file."""
    while True:
        try:
            return os.preadv(fd, [into], offset)
        except InterruptedError:
            continue


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write once at `offset` and return the number of bytes written."""
    while True:
        try:
            return os.pwritev(fd, [data], offset)
        except InterruptedError:
            continue


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`.

    Raises:
        OSError: the write failed; a part may have been written.
    """
    done = 0
    while done < len(data):
        count = write_at(fd, data[done:], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        done += count


def open_file(path: str, *, create: bool, direct: bool) -> int:
    """Open a file of ours for reading and writing, private to the user.

    Raises:
        OSError: as `os.open`; also if `direct` (bypassing the page cache) is refused.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if create:
        flags |= os.O_CREAT | os.O_EXCL
    if direct:
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.EINVAL, "this system has no direct I/O")
        flags |= os.O_DIRECT
    return os.open(path, flags, 0o600)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Return when the file names in a folder survive a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_cached(fd: int, offset: int = 0, length: int = 0) -> None:
    """Drop a range of a file from the page cache (all of it if `length` is 0).

    Unwritten pages stay.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def direct_alignment(fd: int) -> int | None:
    """Return the alignment in bytes that direct I/O on this file needs; 0 if unsupported.

    It applies to offsets, lengths and memory. Return None if the system does not report it (Linux
    before 6.1, most network file systems).
    """
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except (AttributeError, OSError):
        return None
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return None
    mask = int.from_bytes(answer.raw[0:4], "little")
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = (int.from_bytes(answer.raw[at : at + 4], "little") for at in (152, 156))
    return max(memory, offset) if offset else 0


class AlignedBuffer:
    """Page-aligned memory, as bytes and as 64-bit words."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size)  # shared with forked processes (see `readers`)
        self.bytes = memoryview(memory)
        self.words: NDArray[np.uint64] = np.frombuffer(memory, dtype=np.uint64)
        self.address: int = self.words.ctypes.data

    @property
    def size(self) -> int:
        return len(self.bytes)


class BufferPool:
    """Reusable read buffers, which save mapping and clearing new memory for every read."""

    def __init__(self) -> None:
        self._free: list[AlignedBuffer] = []
        self._lock = forks.lock()

    @property
    def nbytes(self) -> int:
        """Return the bytes of buffers that are free now."""
        with self._lock:
            return sum(buffer.size for buffer in self._free)

    @contextlib.contextmanager
    def borrow(self, size: int) -> Iterator[AlignedBuffer]:
        """Lend a buffer of at least `size` bytes with undefined content."""
        buffer = self.take(size)
        try:
            yield buffer
        finally:
            self.give(buffer)

    def take(self, size: int) -> AlignedBuffer:
        """Take a buffer without a scope; return it with `give`.

        A buffer that is dropped instead is freed.
        """
        return self._take(size) or AlignedBuffer(-(-size // _BUFFER_UNIT) * _BUFFER_UNIT)

    def give(self, buffer: AlignedBuffer) -> None:
        """Return a buffer to the pool."""
        with self._lock:
            self._free.append(buffer)
            self._free.sort(key=lambda one: one.size)
            del self._free[:-_KEPT_BUFFERS]

    def _take(self, size: int) -> AlignedBuffer | None:
        """Remove and return the smallest free buffer that is large enough.

        If there is none, drop the smallest, so that the pool never holds more buffers than were
        borrowed at once.
        """
        with self._lock:
            for i, buffer in enumerate(self._free):
                if buffer.size >= size:
                    return self._free.pop(i)
            del self._free[:1]
        return None
