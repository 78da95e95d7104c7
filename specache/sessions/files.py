"""Files of a session: private, written once, and identified by size and digest."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from specache.errors import SessionError
from specache.tiers.disk import aligned_io
from specache.tiers.disk.system_errors import reason

BLOCK = 1 << 20
REPAIR = "'specache session repair NAME -m MODEL' mends what can be read again from its tokens"
DAMAGED = f"It was damaged or replaced since. {REPAIR}; else use another copy of the session, or remove it."


@dataclass(frozen=True)
class StoredFile:
    """An immutable file: its size, and the BLAKE2b digest of its bytes."""

    bytes: int
    digest: str


class PrivateFile:
    """A new file private to the user, digested as it is written.

    Raises:
        OSError: the file cannot be created, written or synced.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._digest = new_digest()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        aligned_io.write_all(self._fd, memoryview(data), self._size)
        self._digest.update(data)
        self._size += len(data)

    def finish(self) -> StoredFile:
        """Return when the content survives a power failure.

        The name does so when the folder is synced.
        """
        os.fsync(self._fd)
        return StoredFile(self._size, self._digest.hexdigest())

    def __enter__(self) -> PrivateFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=32)


@contextmanager
def plain_file(path: Path) -> Iterator[int]:
    """Yield a descriptor for reading a regular file, not reached through a link.

    Raises:
        OSError: there is no such file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "It is no plain file")
        yield fd
    finally:
        os.close(fd)


def check_file(path: Path, expected: StoredFile) -> None:
    """Check that a file is the one that was written.

    Raises:
        SessionError: the file is missing, not a regular file, or has another size or content.
    """
    digest = new_digest()
    try:
        with plain_file(path) as fd:
            size = os.fstat(fd).st_size
            if size != expected.bytes:
                raise SessionError(f"{path} has {size:,} bytes, but {expected.bytes:,} were written. {DAMAGED}")
            while block := os.read(fd, BLOCK):
                digest.update(block)
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {reason(error)} {DAMAGED}") from error
    if digest.hexdigest() != expected.digest:
        raise SessionError(f"{path} is not what was written (its digest differs). {DAMAGED}")
