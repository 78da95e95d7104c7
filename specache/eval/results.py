"""A run's folder: `run.json` (what the run is), `cells.jsonl` (finished cells) and a lock.

A cell is one item under one method. It is on disk before the next one starts, so the same command
can resume the run after any interruption. The lock admits one writing process.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specache.errors import EvaluationError
from specache.eval.result_schema import cell_problem, no_number, run_problem
from specache.platform.output_files import write_whole

RUN_FILE = "run.json"
CELLS_FILE = "cells.jsonl"
LOCK_FILE = ".lock"
WEIGHTS_DIGEST = "weights_digest"  # key of a run's identity, which runs of earlier versions lack

Cell = dict[str, Any]


@dataclass
class Run:
    """The identity of a run.

    Attributes:
        identity: task, its settings, model, digests of its configuration and weights, dtype,
            version, seed. Cells of different identities do not mix.
        unit: of the task's values.
        methods: label -> name and settings, in the order they were first asked for. Methods may be
            added to a run.
        skipped: label -> why the method cannot run on this machine, or at which item it failed.
        origins: where and when cells were measured (`eval/origin.py`). A cell names its own by
            index, under `origin`. Cells of earlier versions name none.
        began: when the run began, in ISO format: what chat templates write as today's date, on
            whatever day the run goes on.
    """

    identity: dict[str, Any]
    unit: str
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    origins: list[dict[str, Any]] = field(default_factory=list)
    began: str | None = None

    @property
    def task(self) -> str:
        """Return the task's name."""
        return str(self.identity["task"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        rest = {"unit": self.unit, "methods": self.methods, "skipped": self.skipped, "origins": self.origins}
        return {**self.identity, **rest, **({} if self.began is None else {"began": self.began})}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Run:
        """Restore a run from the values of `to_dict`."""
        rest = dict(document)
        origins, began = rest.pop("origins", []), rest.pop("began", None)
        unit, methods, skipped = (rest.pop(key) for key in ("unit", "methods", "skipped"))
        return cls(rest, unit, methods, skipped, origins, began)


class ResultFolder:
    """One run's results, open for writing. `open_results` makes it."""

    def __init__(self, folder: Path, run: Run, origin: int | None = None) -> None:
        self.folder = folder
        self.run = run
        self._origin = origin  # index in `run.origins` of the cells that are appended
        self.cells, self._size = _read_cells(folder / CELLS_FILE)
        _check_named(folder, run, self.cells)
        self._done = {(cell["item"], cell["method"]) for cell in self.cells}
        self.save_run()
        self._file = os.open(folder / CELLS_FILE, os.O_WRONLY | os.O_CREAT, 0o644)
        self._truncate()  # drops a line that a killed process left incomplete

    def has(self, item: str, method: str) -> bool:
        """Return whether this cell is finished."""
        return (item, method) in self._done

    def append(self, cell: Cell) -> None:
        """Append a finished cell. It is on disk when this returns.

        Raises:
            EvaluationError: it could not be written (a full disk, for example). The file then ends
                with the cell before it.
        """
        if self._origin is not None:
            cell = {**cell, "origin": self._origin}
        line = (json.dumps(cell, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            _write_all(self._file, line)
            os.fsync(self._file)
        except BaseException as error:
            self._truncate()
            if isinstance(error, OSError):
                raise EvaluationError(self._not_written(error)) from error
            raise
        self._size += len(line)
        self._done.add((cell["item"], cell["method"]))
        self.cells.append(cell)

    def skip(self, label: str, reason: str) -> None:
        """Record why a method was left out."""
        self.run.skipped[label] = reason
        self.save_run()

    def save_run(self) -> None:
        """Write `run.json`."""
        write_file(self.folder / RUN_FILE, json.dumps(self.run.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _truncate(self) -> None:
        with suppress(OSError):
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)

    def _not_written(self, error: OSError) -> str:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot write ({error.strerror or error})"
        return (
            f"{what}: {self.folder / CELLS_FILE}. {len(self.cells)} finished cells are kept there. "
            "Free some space and run the same command again; it goes on where it stopped."
        )


@contextmanager
def open_results(folder: Path, run: Run) -> Iterator[ResultFolder]:
    """Start or resume `run` in `folder`. A resumed run keeps the folder's methods and adds its own.

    Raises:
        EvaluationError: the folder holds another run, is in use, cannot be written, or a line of it
            cannot be parsed.
    """
    from filelock import FileLock, Timeout  # here, since commands that evaluate nothing start faster without

    run = _plain(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK_FILE).touch()
    except OSError as error:
        raise EvaluationError(f"cannot write results to {folder}: {error.strerror or error}. Choose another --out.") from error
    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)  # a soft one would outlive a kill
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise EvaluationError(
            f"another process is writing results to {folder}. Wait for it to finish, or choose another --out."
        ) from None
    except OSError:
        pass  # the file system has no locks
    try:
        with closing(ResultFolder(folder, *_continued(folder, run))) as results:
            yield results
    finally:
        lock.release()


def read_results(folder: Path) -> tuple[Run, list[Cell]]:
    """Return a folder's run and its finished cells. Nothing is changed.

    Raises:
        EvaluationError: the folder holds no run, or a line is no result, or there twice.
    """
    run, cells = _read_run(folder), _read_cells(folder / CELLS_FILE)[0]
    _check_named(folder, run, cells)
    return run, cells


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file of results, whole or not at all (`write_whole`).

    Raises:
        EvaluationError: it cannot be written. The old file is still there.
    """
    try:
        write_whole(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise EvaluationError(
            f"cannot write {path}: {error.strerror or error}. Finished cells in {CELLS_FILE} are kept; "
            "free some space and run the same command again."
        ) from error


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _continued(folder: Path, run: Run) -> tuple[Run, int | None]:
    """Return `run`, or the folder's run with methods and origin of `run` added, and the index of
    that origin.
    """
    origin = 0 if run.origins else None
    if not (folder / RUN_FILE).exists():
        if (folder / CELLS_FILE).exists():
            raise EvaluationError(f"{folder} holds {CELLS_FILE} but no {RUN_FILE} that says what they are. Choose another --out.")
        return run, origin
    if not _read_cells(folder / CELLS_FILE)[0]:
        return run, origin  # the run stopped before anything was measured
    earlier = _read_run(folder)
    differences = _differences(_comparable(earlier, run), _comparable(run, earlier))
    differences += _changed_methods(earlier.methods, run.methods)
    if differences:
        raise EvaluationError(
            f"{folder} holds the results of another run: {'; '.join(differences)}. Nothing was changed. "
            "Choose another --out, or run with the same settings to go on with that one."
        )
    skipped = {label: reason for label, reason in earlier.skipped.items() if label not in run.methods}
    origins = list(earlier.origins)
    if run.origins:
        origin = next((place for place, one in enumerate(origins) if _same_origin(one, run.origins[0])), len(origins))
        origins += run.origins if origin == len(origins) else []
    return Run(earlier.identity, run.unit, {**earlier.methods, **run.methods}, skipped, origins, earlier.began), origin


def _same_origin(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**one, "date": None} == {**other, "date": None}


def _comparable(run: Run, other: Run) -> dict[str, Any]:
    """Return the part of a run's identity that can be compared with another run's.

    Settings of another task are left out, and the digest of the weights if the other has none.
    """
    left_out = {"settings"} if run.task != other.task else set()
    left_out |= {WEIGHTS_DIGEST} - other.identity.keys()
    return {key: value for key, value in run.identity.items() if key not in left_out}


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in [*there, *(key for key in here if key not in there)]:
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {_brief(old)} there and {_brief(new)} here")
    return found


def _changed_methods(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return the differences between methods of the same label.

    A label names only what differs from the defaults, and defaults may have changed since.
    """
    common = [label for label in here if label in there]
    return [
        difference
        for label in common
        for difference in _differences(there[label]["settings"], here[label]["settings"], f"method {label!r}: ")
    ]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_run(folder: Path) -> Run:
    try:
        document = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"), parse_constant=no_number)
        if (problem := run_problem(document)) is not None:
            raise ValueError(problem)
        return Run.from_dict(document)
    except FileNotFoundError:
        raise EvaluationError(f"{folder} holds no results of 'specache eval' (no {RUN_FILE}).") from None
    except OSError as error:
        raise EvaluationError(f"cannot read {folder / RUN_FILE}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{folder / RUN_FILE} is broken: {error}. Nothing was changed.") from error


def _read_cells(path: Path) -> tuple[list[Cell], int]:
    """Return the finished cells, and the file's size in bytes up to the last complete line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}.") from error
    size = data.rfind(b"\n") + 1
    cells = [_cell(path, number, line) for number, line in enumerate(data[:size].split(b"\n")[:-1], start=1)]
    _check_once(path, cells)
    return cells, size


def _check_once(path: Path, cells: list[Cell]) -> None:
    """Check that no cell is there twice: it would count as two items, with narrower intervals."""
    lines: dict[tuple[str, str], int] = {}
    for number, cell in enumerate(cells, start=1):
        first = lines.setdefault((cell["item"], cell["method"]), number)
        if first != number:
            raise EvaluationError(
                f"{path}, line {number} has item {cell['item']!r} under {cell['method']!r} again, after line {first}. "
                "Nothing was changed. Remove one of the two lines; an item counts once."
            )


def _check_named(folder: Path, run: Run, cells: list[Cell]) -> None:
    """Check that `run.json` names the method of every cell: tables would leave the others out."""
    if unnamed := sorted({cell["method"] for cell in cells} - run.methods.keys()):
        raise EvaluationError(
            f"{folder / CELLS_FILE} has results of {', '.join(map(repr, unnamed))}, which {RUN_FILE} does not name: "
            "they are of another run. Nothing was changed. Move those lines back to their own folder."
        )


def _cell(path: Path, number: int, line: bytes) -> Cell:
    try:
        cell = json.loads(line, parse_constant=no_number)
    except json.JSONDecodeError as error:
        reason = f"it is not JSON ({error.msg} at column {error.colno})"
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    else:
        problem = cell_problem(cell)
        if problem is None:
            return dict(cell)
        reason = problem
    raise EvaluationError(
        f"{path}, line {number} is no result: {reason}. Nothing was changed. Repair that line, or remove it to run its cell again."
    )


def _plain(run: Run) -> Run:
    """Return the run as it is read back from disk: tuples as lists, paths as text."""
    return Run.from_dict(json.loads(json.dumps(run.to_dict(), default=str)))
