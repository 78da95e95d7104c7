"""Names and locations of sessions: one private folder each, directly below a root."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specache.errors import ConfigError, SessionError
from specache.platform.folders import cache_folder, earlier_cache_folder
from specache.sessions.lock import FolderLock
from specache.tiers.disk import aligned_io
from specache.tiers.disk.scratch import SCRATCH_PREFIX
from specache.tiers.disk.system_errors import reason

LONGEST_NAME = 100
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_UNFINISHED = ".specache-unfinished-"  # prefix of unfinished folders; no session's name begins with a dot


def default_root() -> Path:
    """Return the default root: `sessions` in the cache folder (`$SPECACHE_CACHE`)."""
    return cache_folder() / "sessions"


def default_roots() -> list[Path]:
    """Return the default root, and the earlier one that ignored `$XDG_CACHE_HOME`, if present."""
    earlier = earlier_cache_folder()
    return [default_root().absolute(), *([] if earlier is None else [(earlier / "sessions").absolute()])]


def root_of(name: str, root: str | os.PathLike[str] | None) -> Path:
    """Return the root in which a session lies, or in which a new one would be created.

    Raises:
        SessionError: a folder cannot be read.
    """
    if root is not None:
        return session_root(root)
    roots = default_roots()
    return next((one for one in roots if is_folder(one / check_name(name))), roots[0])


def check_name(name: str) -> str:
    """Return the name if it is valid.

    Raises:
        ConfigError: it is not.
    """
    if not is_name(name):
        raise ConfigError(
            f"{name[: 2 * LONGEST_NAME]!r} cannot name a session. Use letters, digits and '._-', no dot in front, and at most "
            f"{LONGEST_NAME} characters."
        )
    return name


def is_name(name: str) -> bool:
    """Return True if a name is valid. Scratch folders of the disk tier may lie beside sessions."""
    return len(name) <= LONGEST_NAME and _NAME.fullmatch(name) is not None and not name.startswith(SCRATCH_PREFIX)


def private_root(root: str | os.PathLike[str] | None) -> Path:
    """Return the root, created (private) if it does not exist.

    Raises:
        SessionError: it cannot be created.
    """
    path = session_root(root)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SessionError(f"The folder for sessions {path} cannot be made: {reason(error)}") from error
    return path


def session_root(root: str | os.PathLike[str] | None) -> Path:
    """Return the absolute root, which need not exist."""
    return (Path(root).expanduser() if root is not None else default_root()).absolute()


def is_folder(path: Path) -> bool:
    """Return True if the path is a folder, not a link to one.

    Raises:
        SessionError: the path cannot be read.
    """
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {reason(error)}") from error


def existing_folder(root: Path, name: str) -> Path:
    """Return the folder of an existing session.

    Raises:
        ConfigError: the name is not valid.
        SessionError: there is no such session.
    """
    path = root / check_name(name)
    if not is_folder(path):
        raise SessionError(f"There is no session {name!r} in {root}. 'specache session list' shows those that there are.")
    return path


def check_free(root: Path, name: str) -> Path:
    """Return the folder of a new session.

    Raises:
        ConfigError: the name is not valid.
        SessionError: the name is taken.
    """
    path = root / check_name(name)
    if os.path.lexists(path):
        raise SessionError(f"There is a session {name!r} in {root} already. Choose another name, or remove that one first.")
    return path


@contextmanager
def building(root: Path, name: str) -> Iterator[Path]:
    """Yield a new folder that becomes session `name` if the block succeeds, and else is removed.

    Raises:
        SessionError: the name is taken, or the system refuses.
    """
    target = check_free(root, name)
    try:
        remove_unfinished(root)
        folder, lock = _unfinished_folder(root)
        try:
            yield folder
            aligned_io.sync_folder(folder)
            if os.path.lexists(target):
                raise SessionError(f"Another process has just made a session {name!r}. Choose another name.")
            folder.rename(target)
            aligned_io.sync_folder(root)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            lock.release()
    except OSError as error:
        raise SessionError(f"The session {name!r} cannot be made in {root}: {reason(error)}") from error


def discard(root: Path, folder: Path) -> None:
    """Remove a session's folder, which the caller has locked.

    It is renamed first, so that it disappears at once.

    Raises:
        OSError: the system refuses.
    """
    discarded = root / f"{_UNFINISHED}{secrets.token_hex(8)}"
    folder.rename(discarded)
    aligned_io.sync_folder(root)
    shutil.rmtree(discarded, ignore_errors=True)


def remove_unfinished(root: Path) -> None:
    """Remove folders that killed processes were creating or removing."""
    for path in root.glob(f"{_UNFINISHED}*"):
        with suppress(SessionError, OSError):  # in use, or removed already
            if is_folder(path):
                with FolderLock(path):
                    shutil.rmtree(path, ignore_errors=True)


def _unfinished_folder(root: Path) -> tuple[Path, FolderLock]:
    """Return a new folder and its lock, which protects it from `remove_unfinished`."""
    while True:
        folder = root / f"{_UNFINISHED}{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        with suppress(SessionError):  # another process removed it as abandoned before it was locked
            return folder, FolderLock(folder)
