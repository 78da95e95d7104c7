"""Folders of the disk tier: the user's, checked before anything depends on it, and one per tier that belongs to no session."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from pathlib import Path

from specache.errors import SlowTierError

SCRATCH_PREFIX = "specache-scratch-"
PROBE_PREFIX = ".specache-probe-"  # of files that are there for a moment, to see what can be done
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


def prepare_folder(folder: str | os.PathLike[str]) -> Path:
    """Make the user's folder if it is not there (private), and see that files can be made in it.

    Raises:
        SlowTierError: they cannot.
    """
    if not hasattr(os, "preadv"):
        raise SlowTierError("The disk tier needs a system with positioned reads (Linux, macOS). Use slow_tier='ram'.")
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        trial = path / f"{PROBE_PREFIX}{secrets.token_hex(8)}"
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        trial.unlink()
    except OSError as error:
        raise SlowTierError(
            f"The slow tier's folder {path} cannot be written: {error.strerror or error}. Choose a folder that you may write, for "
            "example slow_tier='disk:/var/tmp/specache'."
        ) from error
    return path


class ScratchFolder:
    """A private folder inside the user's, gone when the last file in it is.

    It is locked while its process lives, so that the next one can tell what a killed process left behind, and remove it.
    """

    def __init__(self, parent: Path) -> None:
        remove_abandoned(parent)
        self._users = 1
        self._lock = threading.RLock()  # a finalizer may release in the middle of a release
        self._process = os.getpid()
        try:
            self.path, self._fd = _locked_folder(parent)
        except OSError as error:
            raise SlowTierError(f"No folder can be made in {parent}: {error.strerror or error}. Choose another one.") from error

    def acquire(self) -> None:
        """One more user."""
        with self._lock:
            self._users += 1

    def remove(self, path: Path) -> None:
        """Remove a file of the folder's. One that cannot be goes with the folder, or when the next program starts."""
        if self._process == os.getpid():  # a forked process lets go of a copy; the files are its parent's
            with contextlib.suppress(OSError):
                path.unlink()

    def release(self) -> None:
        """One user less; the last one removes the folder."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        if self._process == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new folder and its locked descriptor."""
    import fcntl

    while True:
        path = parent / f"{SCRATCH_PREFIX}{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, _FOLDER_FLAGS)
            with contextlib.suppress(OSError):  # a file system without locks: nothing there is ever taken for abandoned
                fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists():
                return path, fd
            os.close(fd)
        # Another process took it for abandoned before it was locked.


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders of processes that were killed."""
    import fcntl

    for path in parent.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, gone already, or not ours
            fd = os.open(path, _FOLDER_FLAGS)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
