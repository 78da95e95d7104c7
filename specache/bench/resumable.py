"""A results file that grows one result at a time, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specache.bench.base import Result
from specache.errors import BenchmarkError
from specache.platform.output_files import write_whole

Key = tuple[Any, ...]


class ResultFile:
    """One JSON object: what identifies the run, values kept with it, and its results.

    Args:
        path: of the file, or `None` to keep results in memory only.
        run: everything that results depend on, JSON-ready. A file of another run is refused.
        key: names of the values that identify a result.

    Raises:
        BenchmarkError: the file belongs to another run, is not a results file, or cannot be read.
    """

    def __init__(self, path: Path | None, run: dict[str, Any], key: tuple[str, ...]) -> None:
        self.path = None if path is None else path.expanduser()
        self.kept: dict[str, Any] = {}
        self.results: list[Result] = []
        self._run = json.loads(json.dumps(run))
        self._key = key
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def has(self, *key: Any) -> bool:
        """Return whether the result with this key is in the file."""
        return any(tuple(result[name] for name in self._key) == key for result in self.results)

    def add(self, result: Result, completed: Callable[[list[Result]], list[Result]]) -> None:
        """Add a result. The file has been written when this returns.

        Args:
            completed: returns all results with the values that depend on each other filled in.

        Raises:
            BenchmarkError: the file cannot be written. Its content is as before.
        """
        self.results = completed([*self.results, result])
        if self.path is not None:
            document = {"run": self._run, **self.kept, "results": self.results}
            _replace(self.path, json.dumps(document, indent=1, allow_nan=False) + "\n")

    def _read(self, path: Path) -> None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            run, self.results = document.pop("run"), list(document.pop("results"))
            known = [tuple(result[name] for name in self._key) for result in self.results]
        except OSError as error:
            raise BenchmarkError(f"cannot read {path}: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BenchmarkError(f"--out {path} holds no results of this benchmark. Nothing was changed. Choose another.") from None
        differences = _differences(run, self._run)
        if differences or len(set(known)) != len(known):
            raise BenchmarkError(
                f"--out {path} holds the results of another run: {'; '.join(differences) or 'some are there twice'}. Nothing was "
                "changed. Choose another --out, or run with the same options to go on with that one."
            )
        self.kept = document


def _differences(there: Any, here: dict[str, Any]) -> list[str]:
    if not isinstance(there, dict):
        return ["it does not say which"]
    names = [*there, *(name for name in here if name not in there)]
    return [
        f"{name} is {json.dumps(there.get(name))} there and {json.dumps(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name)
    ]


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror or error}. What it held before is kept.") from error
