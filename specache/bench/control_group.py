"""A memory limit that the kernel enforces: a control group (version 1) of its own for a process, its page cache counted."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specache.errors import BenchmarkError

HIERARCHY = Path("/sys/fs/cgroup/memory")
_PREFIX = "specache-"  # of a group's name, before the number of the process that made it
_REMOVAL_S = 5.0  # an ended process leaves its group a moment later


class MemoryGroup:
    """A control group under this process's own, removed at the end of a `with` block; its processes have ended then.

    Groups of processes that were killed before they could remove theirs are removed when the next one is made.

    Raises:
        BenchmarkError: this system has no such groups, or they cannot be made by this user.
    """

    def __init__(self) -> None:
        self._outside = HIERARCHY / _own_group()
        self._folder = self._outside / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        _remove_abandoned(self._outside)
        try:
            self._folder.mkdir()
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
        """This process is in the group inside the block, and what it starts there stays in it."""
        self._write("cgroup.procs", os.getpid())
        try:
            yield
        finally:
            (self._outside / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, size: int) -> None:
        """Allow so many bytes from now on; a process that needs more is killed.

        Raises:
            BenchmarkError: more than that is in use and cannot be given back.
        """
        with suppress(OSError):  # of an earlier, smaller limit: memory alone may not have more than memory and swap
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
        """Give back the page cache and begin a new peak."""
        with suppress(OSError):
            self._write("memory.force_empty", 0)
        self._write("memory.max_usage_in_bytes", 0)

    @property
    def used(self) -> int:
        """Bytes in use, the page cache included."""
        return self._read("memory.usage_in_bytes")

    @property
    def peak(self) -> int:
        """Most bytes in use since `forget_peak`, the page cache included."""
        return self._read("memory.max_usage_in_bytes")

    def _remove(self) -> None:
        deadline = time.monotonic() + _REMOVAL_S
        while True:
            try:
                self._folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _read(self, name: str) -> int:
        return int((self._folder / name).read_text())

    def _write(self, name: str, value: int) -> None:
        (self._folder / name).write_text(str(value))


def _remove_abandoned(folder: Path) -> None:
    """Remove the empty groups whose makers have ended."""
    for group in folder.glob(f"{_PREFIX}*-*"):
        maker = group.name.removeprefix(_PREFIX).split("-")[0]
        if maker.isdigit() and not Path("/proc", maker).exists():
            with suppress(OSError):  # not empty: what it started still runs
                group.rmdir()


def _own_group() -> str:
    """The memory group of this process, relative to the hierarchy; its root if the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                return path.lstrip("/")
    return ""
