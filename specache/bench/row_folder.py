"""The folder of a benchmark's disk tier."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specache.errors import BenchmarkError


@contextmanager
def row_folder(parent: Path | None) -> Iterator[Path]:
    """Make a temporary folder in `parent` or the system's default, and remove it with its content.

    Raises:
        BenchmarkError: the folder cannot be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="specache-bench-", dir=None if parent is None else parent.expanduser())
    except OSError as error:
        raise BenchmarkError(f"no folder can be made in {parent or tempfile.gettempdir()}: {error.strerror or error}.") from error
    with folder as path:
        yield Path(path)
