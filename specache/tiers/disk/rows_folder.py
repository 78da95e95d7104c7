"""The folder that `slow_tier="auto"` writes rows to: on a real disk, with room for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from specache.errors import SlowTierError
from specache.platform.folders import cache_folder
from specache.tiers.disk.scratch import prepare_folder

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs"})  # file systems whose files take main memory
DISK_RESERVE = 256 << 20  # bytes that are left free beside the rows
_ROWS = "rows"


@dataclass(frozen=True)
class FolderFacts:
    """What is known of a folder that need not exist yet.

    Attributes:
        existing: the folder, or the nearest one above it that is there.
        file_system: its type, for example `ext4`; `None` where the system does not tell.
        free: bytes that this user may still write there.
    """

    folder: Path
    existing: Path
    file_system: str | None
    free: int

    @property
    def in_memory(self) -> bool:
        """Whether its files would take the memory that they are to save."""
        return self.file_system in IN_MEMORY


def choose_rows_folder(size: int, *, make: bool = True) -> FolderFacts:
    """Return the first candidate folder on a disk with room for `size` bytes of rows that this user may write.

    It is made unless `make` is false. Candidates are `rows` in the cache folder, the folder of temporary files (`$TMPDIR`) and
    `/var/tmp`.

    Raises:
        SlowTierError: none of them will do; the message says why each was refused, and what to do.
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
    """Return what the system says of a folder, or of the nearest one above it that exists.

    Raises:
        OSError: the system does not say it.
    """
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return FolderFacts(folder, existing, file_system_of(existing), shutil.disk_usage(existing).free)


def file_system_of(path: Path) -> str | None:
    """Return the type of the file system that an existing path lies on; `None` where `/proc` does not list mounts."""
    real = os.path.realpath(path)
    longest, kind = -1, None
    for mount, mounted in _mounts():
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:  # of two mounts on one folder the later one is seen
            longest, kind = len(mount), mounted
    return kind


def _mounts() -> list[tuple[str, str]]:
    """(folder, type) of every mounted file system."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    parts = [line.split(" ") for line in lines]
    return [(_unescaped(fields[1]), fields[2]) for fields in parts if len(fields) > 2]


def _unescaped(mount: str) -> str:
    """The kernel writes blanks in names as octal numbers."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        mount = mount.replace(code, character)
    return mount
