"""Folders of the disk tier: the user's, checked before use, and one per temporary tier."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from specache.errors import SlowTierError
from specache.platform import forks

SCRATCH_PREFIX = "specache-scratch-"
PROBE_PREFIX = ".specache-probe-"  # prefix of temporary files that test what a folder allows
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


def prepare_folder(folder: str | os.PathLike[str]) -> Path:
    """Create the user's folder if needed (private), and check that files can be created in it.

    Raises:
        SlowTierError: no file can be created.
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
    """A private folder inside the user's, removed with its last file.

    It is locked while its process lives, so that a later process can recognise and remove what a
    killed process left.
    """

    def __init__(self, parent: Path) -> None:
        remove_abandoned(parent)
        self._users = 1
        self._lock = forks.reentrant_lock()  # a finalizer may release in the middle of a release
        self._process = os.getpid()
        try:
            self.path, self._fd = _locked_folder(parent)
        except OSError as error:
            raise SlowTierError(f"No folder can be made in {parent}: {error.strerror or error}. Choose another one.") from error

    def acquire(self) -> None:
        """Add a user."""
        with self._lock:
            self._users += 1

    def remove(self, path: Path) -> None:
        """Remove a file of the folder.

        On failure it goes with the folder, or at the next program start.
        """
        if self._process == os.getpid():  # a forked process releases a copy; the files belong to its parent
            with contextlib.suppress(OSError):
                path.unlink()

    def release(self) -> None:
        """Remove a user; the last one removes the folder."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        if self._process == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """Create a folder and return it with its locked descriptor."""
    import fcntl

    while True:
        path = parent / f"{SCRATCH_PREFIX}{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, _FOLDER_FLAGS)
            with contextlib.suppress(OSError):  # a file system without locks: nothing there is ever considered abandoned
                fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists():
                return path, fd
            os.close(fd)
        # Another process considered it abandoned before it was locked, and removed it.


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders of processes that were killed."""
    import fcntl

    for path in parent.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, removed already, or not ours
            fd = os.open(path, _FOLDER_FLAGS)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
