"""A memory limit that the kernel enforces: a control group (version 1), page cache included."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specache.errors import BenchmarkError

HIERARCHY = Path("/sys/fs/cgroup/memory")
_PREFIX = "specache-"  # prefix of a group's name, followed by its maker's process id
_REMOVAL_S = 5.0  # longest wait for ended processes to leave the group


class MemoryGroup:
    """A control group below this process's own. The end of the `with` block removes it, when its
    processes must have ended.

    Making a group also removes groups left behind by processes that were killed.

    Raises:
        BenchmarkError: the system has no such groups, or this user may not create one.
    """

    def __init__(self) -> None:
        self._outside = HIERARCHY / _own_group()
        self.folder = self._outside / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        _remove_abandoned(self._outside)
        try:
            self.folder.mkdir()
        except OSError as error:
            raise BenchmarkError(
                f"a memory limit needs control groups of version 1 under {HIERARCHY} and the right to make one (root): "
                f"{error.strerror or error}."
            ) from None
        with suppress(OSError):
            self._write("memory.swappiness", 0)  # swap would be memory outside the limit

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Move this process into the group inside the block. Processes started there stay in it."""
        self._write("cgroup.procs", os.getpid())
        try:
            yield
        finally:
            (self._outside / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, size: int) -> None:
        """Limit the group to `size` bytes. The kernel kills a process that needs more.

        Raises:
            BenchmarkError: more is in use and cannot be reclaimed.
        """
        with suppress(OSError):  # a smaller limit on memory and swap would refuse the new one
            self._write("memory.memsw.limit_in_bytes", -1)
        try:
            self._write("memory.limit_in_bytes", size)
        except OSError as error:
            raise BenchmarkError(
                f"memory cannot be limited to {size:,} bytes: {self.used:,} are in use ({error.strerror or error})."
            ) from None
        with suppress(OSError):  # kernels without swap accounting
            self._write("memory.memsw.limit_in_bytes", size)

    def forget_peak(self) -> None:
        """Drop the page cache and restart the peak."""
        with suppress(OSError):
            self._write("memory.force_empty", 0)
        self._write("memory.max_usage_in_bytes", 0)

    @property
    def used(self) -> int:
        """Return the bytes in use, page cache included."""
        return self._read("memory.usage_in_bytes")

    @property
    def peak(self) -> int:
        """Return the most bytes in use since `forget_peak`, page cache included."""
        return self._read("memory.max_usage_in_bytes")

    def _remove(self) -> None:
        deadline = time.monotonic() + _REMOVAL_S
        while True:
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _read(self, name: str) -> int:
        return int((self.folder / name).read_text())

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))


def _remove_abandoned(folder: Path) -> None:
    """Remove the empty groups of processes that have ended."""
    for group in folder.glob(f"{_PREFIX}*-*"):
        maker = group.name.removeprefix(_PREFIX).split("-")[0]
        if maker.isdigit() and not Path("/proc", maker).exists():
            with suppress(OSError):  # not empty: its child processes still run
                group.rmdir()


def _own_group() -> str:
    """Return this process's memory group relative to the hierarchy, or "" if unknown."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                return path.lstrip("/")
    return ""
