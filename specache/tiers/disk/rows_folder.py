"""Choose the folder that `slow_tier="auto"` writes rows to: on a real disk with free space."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from specache.errors import SlowTierError
from specache.platform.folders import cache_folder
from specache.tiers.disk.scratch import prepare_folder

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs"})  # file systems that keep files in main memory
DISK_RESERVE = 256 << 20  # bytes to leave free beside the rows
_ROWS = "rows"


@dataclass(frozen=True)
class FolderFacts:
    """Facts about a folder that need not exist yet.

    Attributes:
        existing: the folder, or its nearest existing parent.
        file_system: type of its file system, for example `ext4`; None if unknown.
        free: bytes that this user may still write there.
    """

    folder: Path
    existing: Path
    file_system: str | None
    free: int

    @property
    def in_memory(self) -> bool:
        """Return True if files there would take main memory."""
        return self.file_system in IN_MEMORY


def choose_rows_folder(size: int, *, make: bool = True) -> FolderFacts:
    """Return the first writable candidate folder on a disk with room for `size` bytes.

    It is created unless `make` is false. Candidates are `rows` in the cache folder, the folder of
    temporary files (`$TMPDIR`) and `/var/tmp`.

    Raises:
        SlowTierError: no candidate is usable; the message gives each reason, and what to do.
    """
    refused = []
    for folder in candidates():
        try:
            facts = folder_facts(folder)
            if facts.in_memory:
                refused.append(f"{folder} is on {facts.file_system}, in memory itself")
            elif facts.free < size + DISK_RESERVE:
                refused.append(f"{folder} has {facts.free:,} bytes free")
            elif not os.access(facts.existing, os.W_OK | os.X_OK):
                refused.append(f"{folder} cannot be written")
            else:
                if make:
                    prepare_folder(folder)
                return facts
        except (OSError, SlowTierError) as error:
            refused.append(str(error))
    raise SlowTierError(
        f"The 16-bit pairs need {size:,} bytes (and {DISK_RESERVE:,} to spare) on a disk, and no folder has room: "
        f"{'; '.join(refused)}. Free some space, set SPECACHE_CACHE to a folder on a disk, or name one: slow_tier='disk:FOLDER'."
    )


def candidates() -> list[Path]:
    """Return the folders that `choose_rows_folder` tries, in order."""
    folders = [cache_folder() / _ROWS, Path(tempfile.gettempdir()), Path("/var/tmp")]
    return list(dict.fromkeys(folder.absolute() for folder in folders))


def folder_facts(folder: Path) -> FolderFacts:
    """Return the facts about a folder, or about its nearest existing parent.

    Raises:
        OSError: the system does not report them.
    """
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return FolderFacts(folder, existing, file_system_of(existing), shutil.disk_usage(existing).free)


def file_system_of(path: Path) -> str | None:
    """Return the type of an existing path's file system; None if `/proc` lists no mounts."""
    real = os.path.realpath(path)
    longest, kind = -1, None
    for mount, mounted in _mounts():
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:  # of two mounts on one folder the later one is visible
            longest, kind = len(mount), mounted
    return kind


def _mounts() -> list[tuple[str, str]]:
    """Return (folder, type) of every mounted file system."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    parts = [line.split(" ") for line in lines]
    return [(_unescaped(fields[1]), fields[2]) for fields in parts if len(fields) > 2]


def _unescaped(mount: str) -> str:
    """Return a mount path with the kernel's octal escapes of blanks resolved."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        mount = mount.replace(code, character)
    return mount
