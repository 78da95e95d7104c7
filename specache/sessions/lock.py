"""Lock a session's folder for one process.

The system releases the lock when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from specache.errors import SessionError
from specache.tiers.disk.system_errors import reason

LOCK_FILE = "lock"
_LONGEST = 4096  # bytes read of a holder's description
_FORK = "'specache session fork' makes a copy to work with at the same time."


class FolderLock:
    """An exclusive lock, held until `release`, garbage collection, or the end of the process.

    Args:
        folder: the folder, in which the lock's file is.
        otherwise: what a user can do while another process has the folder, for the message.

    Raises:
        SessionError: the lock is held (the message says by whom), the folder is gone, or the file
            system has no locks.
    """

    def __init__(self, folder: Path, otherwise: str = _FORK) -> None:
        import fcntl

        self._fd = -1
        self._process = os.getpid()
        self._flock, self._unlock = fcntl.flock, fcntl.LOCK_UN  # when the program ends, nothing can be imported
        self._path = folder / LOCK_FILE
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.in_place:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._sign()
        except BlockingIOError:
            holder = self._holder()
            self.release()
            raise SessionError(
                f"{folder} is in use by {holder}. Wait until it is done, or end it; the lock goes when its process does. "
                f"{otherwise}"
            ) from None
        except OSError as error:
            self.release()
            raise SessionError(f"{folder} cannot be locked: {reason(error)}") from error

    @property
    def held(self) -> bool:
        return self._fd >= 0

    @property
    def in_place(self) -> bool:
        """Return whether the folder's path still leads to the folder that was locked.

        Another one in its place (a backup, a session of the same name) is not locked by this.
        """
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.lstat())
        except OSError:
            return False

    def release(self) -> None:
        """Release the lock. Safe to call twice.

        Processes that were forked meanwhile have the file open too, and would keep the lock as long
        as they run; released there, it stays with the process that took it.
        """
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if self._process == os.getpid():
            with contextlib.suppress(OSError):
                self._flock(fd, self._unlock)
        os.close(fd)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def _sign(self) -> None:
        """Write the holder's description, for the error message of others."""
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        text = json.dumps(mine).encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)

    def _holder(self) -> str:
        try:
            holder = json.loads(os.pread(self._fd, _LONGEST, 0))
            return f"process {int(holder['pid'])} on {str(holder['host'])[:100]} since {str(holder['since'])[:30]}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it is being written, or has another writer
            return "another process"
