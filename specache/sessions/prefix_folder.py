"""A folder of stored prefixes: what is there, its bytes, and which go first.

One process has the folder, from opening to closing. Within it any thread may call. A prefix is
written by one thread and read by another; removing one that is being read does not disturb it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from specache.cache.prefixes import Tokens, tokens_of
from specache.cache.sequence import Sequence
from specache.config import SpeCacheConfig
from specache.errors import SessionError, SlowTierError
from specache.platform import forks
from specache.sessions import names
from specache.sessions.lock import FolderLock
from specache.sessions.manifest import Identity
from specache.sessions.manifest_file import FILE
from specache.sessions.prefix_files import (
    SavedPrefix,
    Stop,
    disk_usage,
    is_prefix_name,
    planned_bytes,
    prefix_name,
    read_record,
    shared_blocks,
    write_prefix,
)
from specache.sessions.prefix_reading import read_pieces
from specache.tiers.disk.rows_folder import DISK_RESERVE


@dataclass(frozen=True)
class IgnoredPrefix:
    """A folder that this server cannot use: damaged, or of another model or other settings.

    Attributes:
        problem: what is wrong with it.
        files, used: as `SavedPrefix` has them.
    """

    folder: Path
    problem: str
    files: dict[int, int]
    used: float


class PrefixFolder:
    """The prefixes of one folder.

    Args:
        root: the folder; created (private) if it does not exist. Other files in it are left alone.
        identity: of the model, without a tokenizer.
        config: the settings of its caches.
        most_bytes: the most bytes of all prefixes together; None is unlimited.

    Attributes:
        saved: the prefixes that can be used.
        ignored: the others.
        removals: how many were removed or found damaged since the folder was opened.

    Raises:
        SessionError: another process has the folder, or the system refuses.
    """

    def __init__(self, root: str | os.PathLike[str], identity: Identity, config: SpeCacheConfig, most_bytes: int | None) -> None:
        self.root = names.private_root(root)
        self.most_bytes = most_bytes
        self._identity, self._config = identity, config
        self._changing = forks.reentrant_lock()
        self._removed: list[SavedPrefix] = []  # whose rows are still read by sequences
        self._reading: list[SavedPrefix] = []  # are being brought back, and stay meanwhile
        self._lock = FolderLock(self.root, "Processes at the same time need a folder each.")
        self.removals = 0
        self.saved: list[SavedPrefix] = []
        self.ignored: list[IgnoredPrefix] = []
        try:
            names.remove_unfinished(self.root)
            for folder in sorted(self.root.iterdir()):
                if is_prefix_name(folder.name) and names.is_folder(folder):
                    self._add(folder)
            self.saved.sort(key=lambda one: one.used)
            self.make_room(0)
        except OSError as error:
            self._lock.release()
            raise SessionError(f"The folder of prefixes {self.root} cannot be read: {error.strerror}.") from error
        except BaseException:
            self._lock.release()
            raise

    @property
    def nbytes(self) -> int:
        """Return the bytes of all prefixes on the disk. Linked files count once.

        Removed ones count as long as a sequence reads their rows.
        """
        with self._changing:
            self._removed = [one for one in self._removed if one.is_read]
            files: dict[int, int] = {}
            for one in (*self.saved, *self._removed):
                files |= one.files
            for ignored in self.ignored:
                files |= ignored.files
            return sum(files.values())

    def write(self, owner: str, sequence: Sequence, stop: Stop) -> SavedPrefix:
        """Write a sequence that nothing else changes meanwhile; least recently used ones make room.

        Rows that another prefix of the owner has are linked to. One thread at a time may call this.

        Args:
            owner: digest of its owner's name.
            stop: see `write_prefix`.

        Raises:
            SessionError, SlowTierError, OSError, Stopped: it was not written; nothing is left.
        """
        text = tokens_of(sequence.token_ids)
        name = prefix_name(owner, self._identity, self._config, text)
        with self._changing:
            there = next((one for one in self.saved if one.folder.name == name), None)
            if there is not None:
                return there
            base = self._base(owner, text)
            for one in [one for one in self.ignored if one.folder.name == name]:
                self._discard(one)
        needed = planned_bytes(sequence, shared_blocks(base, text))
        if not self.make_room(needed, sparing=base):
            raise SessionError(
                f"A prefix of {len(text):,} tokens needs up to {needed:,} bytes on the disk, and all prefixes together may have "
                f"{self.most_bytes:,} (--prefix-bytes); those in use stay."
            )
        free = shutil.disk_usage(self.root).free
        if free < needed + DISK_RESERVE:
            raise SessionError(f"A prefix of {len(text):,} tokens needs up to {needed:,} bytes, and the disk has {free:,} left.")
        write_prefix(self.root, name, sequence, self._config, self._identity, base, stop)
        with self._changing:
            saved = self._add(self.root / name)
        if saved is None:
            raise SessionError(f"{self.root / name} cannot be read back.")
        return saved

    def pieces(self, saved: SavedPrefix, sequence: Sequence, length: int) -> Generator[None, None, bool]:
        """Fill an empty sequence with the first tokens of a prefix (`read_pieces`).

        Returns False if it was removed meanwhile. A damaged one is ignored from now on. It is not
        removed for others while it is read.

        Raises:
            SessionError, SlowTierError: it is damaged.
            FastMemoryError, NoRoomError: the cache has no room.
        """
        with self._changing:
            if saved.gone:
                return False
            self._reading.append(saved)
        try:
            yield from read_pieces(saved, sequence, length)
        except (SessionError, SlowTierError) as error:
            if saved.gone:  # removed meanwhile
                return False
            self.ignore(saved, str(error))
            raise
        finally:
            with self._changing:
                self._reading.remove(saved)
        self.touch(saved)
        return True

    def touch(self, saved: SavedPrefix, used: float | None = None) -> None:
        """Count a prefix as used at a time (now), also for the next server on this folder."""
        with self._changing:
            saved.used = time.time() if used is None else used
            if not saved.gone:
                with suppress(OSError):
                    os.utime(saved.folder / FILE, (saved.used, saved.used))

    def ignore(self, saved: SavedPrefix, problem: str) -> None:
        """Do not use a prefix any more. It is removed when its bytes or its name are needed."""
        with self._changing:
            if saved.gone:
                return
            saved.gone = True
            self.removals += 1
            self.saved.remove(saved)
            self.ignored.append(IgnoredPrefix(saved.folder, problem, saved.files, 0.0))

    def remove(self, saved: SavedPrefix) -> None:
        """Remove a prefix. Files that others link to remain."""
        with self._changing:
            if not saved.gone:
                self._discard(saved)

    def make_room(self, needed: int, sparing: SavedPrefix | None = None) -> bool:
        """Remove prefixes until `needed` bytes are left below the limit; return whether they are.

        Least recently used ones go first, before them those that were found damaged when they were
        used. Those whose rows a sequence reads stay: their bytes would stay too.
        """
        with self._changing:
            while self.most_bytes is not None and self.nbytes + needed > self.most_bytes:
                spared = (sparing, *self._reading)
                unread = [one for one in self.saved if one not in spared and not one.is_read]
                others: list[SavedPrefix | IgnoredPrefix] = [*self.ignored, *unread]
                if not others or needed > self.most_bytes:
                    return False
                self._discard(min(others, key=lambda one: one.used))
        return True

    def close(self) -> None:
        """Release the folder. Safe to call twice."""
        self._lock.release()

    def _base(self, owner: str, text: Tokens) -> SavedPrefix | None:
        """Return the prefix that shares most blocks of rows with a text."""
        others = [one for one in self.saved if one.owner == owner]
        return max(others, key=lambda one: (shared_blocks(one, text), one.used), default=None)

    def _add(self, folder: Path) -> SavedPrefix | None:
        """Add a folder to the prefixes that can be used, or to the ignored ones."""
        try:
            saved = read_record(folder, self._identity, self._config)
        except SessionError as error:
            self.ignored.append(IgnoredPrefix(folder, str(error), _usage(folder), _last_use(folder)))
            return None
        self.saved.append(saved)
        return saved

    def _discard(self, one: SavedPrefix | IgnoredPrefix) -> None:
        """Remove a folder, which disappears at once, and forget it."""
        if isinstance(one, SavedPrefix):
            one.gone = True
            self.removals += 1
            self.saved.remove(one)
            self._removed.append(one)
        else:
            self.ignored.remove(one)
        try:
            names.discard(self.root, one.folder)
        except OSError:  # perhaps somebody removed it
            shutil.rmtree(one.folder, ignore_errors=True)


def problems(ignored: Iterable[IgnoredPrefix]) -> dict[str, str]:
    """Return what is wrong with ignored prefixes, by the names of their folders."""
    return {one.folder.name: one.problem for one in ignored}


def _usage(folder: Path) -> dict[int, int]:
    try:
        return disk_usage(folder)
    except SessionError:
        return {}


def _last_use(folder: Path) -> float:
    try:
        return (folder / FILE).lstat().st_mtime
    except OSError:
        return 0.0
