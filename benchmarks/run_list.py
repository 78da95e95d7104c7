"""Read `benchmarks/runs.toml`: the runs from which the results board is made."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("runs.toml")
GROUPS = ("eval", "bench")  # of specache's commands
_KEYS = {"name", "question", "minutes", "command"}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class RunListError(ValueError):
    """The list of runs, or what was asked of it, is wrong. The message says what to do."""


@dataclass(frozen=True)
class ListedRun:
    """One run.

    Attributes:
        name: of its folder and of its summary.
        question: section of the board that shows it.
        minutes: a first estimate of its time; finished runs correct the estimates of the others.
        command: behind `specache`, without `--out` or `--json`. `{gemma}` is the path of a model
            that `--model gemma=PATH` names.
    """

    name: str
    question: str
    minutes: float
    command: str

    @property
    def needs(self) -> list[str]:
        """Return the names of models whose paths must be given."""
        return list(dict.fromkeys(_PLACEHOLDER.findall(self.command)))

    def arguments(self, models: dict[str, str]) -> list[str]:
        """Return the command's arguments, with the paths of models filled in."""
        return [_PLACEHOLDER.sub(lambda name: models[name[1]], word) for word in shlex.split(self.command)]


@dataclass(frozen=True)
class RunList:
    """All runs, and the names under which the board shows models."""

    runs: list[ListedRun]
    models: dict[str, str]

    def chosen(self, only: str) -> list[ListedRun]:
        """Return the runs of a comma-separated list of names, or all if it is empty.

        Raises:
            RunListError: no run has one of the names.
        """
        names = [name.strip() for name in only.split(",") if name.strip()]
        known = [run.name for run in self.runs]
        if unknown := [name for name in names if name not in known]:
            raise RunListError(f"no run is called {', '.join(unknown)}. There are: {', '.join(known)}.")
        return [run for run in self.runs if not names or run.name in names]


def read_run_list(path: Path = FILE) -> RunList:
    """Read the list.

    Raises:
        RunListError: the file is missing or malformed. The message names the entry.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunListError(f"cannot read {path}: {error}") from None
    runs = []
    for number, entry in enumerate(document.get("runs", []), 1):
        if entry.keys() != _KEYS:
            raise RunListError(f"{path}, run {number}: expected the keys {', '.join(sorted(_KEYS))}, got {', '.join(entry)}.")
        run = ListedRun(**entry)
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", run.name) or run.name in {other.name for other in runs}:
            raise RunListError(f"{path}: {run.name!r} is no name of a file in small letters, or is there twice.")
        if shlex.split(run.command)[0] not in GROUPS:
            raise RunListError(f"{path}, {run.name}: a command begins with {' or '.join(GROUPS)}.")
        runs.append(run)
    return RunList(runs, document.get("models", {}))
