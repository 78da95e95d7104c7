"""Where a benchmark's disk tier puts its files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specache.errors import BenchmarkError


@contextmanager
def row_folder(parent: Path | None) -> Iterator[Path]:
    """A folder of its own in `parent` (or where the system keeps temporary files), removed at the end with all that is in it.

    Raises:
        BenchmarkError: it cannot be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="specache-bench-", dir=None if parent is None else parent.expanduser())
    except OSError as error:
        raise BenchmarkError(f"no folder can be made in {parent or tempfile.gettempdir()}: {error.strerror or error}.") from error
    with folder as path:
        yield Path(path)
