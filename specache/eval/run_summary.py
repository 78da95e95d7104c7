"""Reduce a result folder to one small JSON document, which the results board keeps.

It has the rows of the report, what identifies the run, where every row was measured, and the
command that measures the same again. Items and their values stay in the folder.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from specache.errors import ConfigError, EvaluationError
from specache.eval import catalogue
from specache.eval.results import WEIGHTS_DIGEST, Cell, Run, read_results
from specache.eval.setting_fields import flag, shown
from specache.eval.table_rows import Row, aggregate, is_score

FORMAT = 1
ALL = "all"  # group of the rows over all groups of items
MOST_LENGTHS = 16  # items per method up to which each one has an entry under `lengths`
_DIGITS = 6
_LEFT_OUT = ("config", "memory", "unit")  # said once per method or run, or relative to other rows
_DEFAULT_DTYPE = "float32"  # of `specache eval`


def summarise(folder: Path, *, commit: str | None = None) -> dict[str, Any]:
    """Return the summary of a folder's finished cells, JSON-ready.

    Its keys: `format`, `task`, `settings`, `model`, `dtype` and what else identifies the run;
    `unit`, `command`, `methods` (label -> name and all settings), `skipped`, `origins`, and three
    lists of rows:
    - `rows`: one per group of items and method, as in the report, with `commit` and
      `prompt_tokens` (shortest and longest prompt).
    - `overall`: the same over all groups together.
    - `lengths`: for tasks with one value per token, each item's mean and memory by prompt length.

    Args:
        commit: that measured the cells which do not say it themselves.

    Raises:
        EvaluationError: the folder holds no finished cells, or some do not say which commit
            measured them and `commit` is None.
    """
    run, cells = read_results(folder)
    cells = [cell for cell in cells if cell["values"]]
    if not cells:
        raise EvaluationError(f"{folder} holds no finished cells yet.")
    commits = [_commit(run, cell) or commit for cell in cells]
    if None in commits:
        raise EvaluationError(
            f"{commits.count(None)} of the {len(cells)} cells in {folder} do not say which commit measured them (they come from an "
            "earlier version, or from a specache outside of a checkout). Name it with --commit."
        )
    by_cell = [({**cell, "commit": one}) for cell, one in zip(cells, commits, strict=True)]
    identity = {key: value for key, value in run.identity.items() if key not in ("fingerprint", WEIGHTS_DIGEST)}
    pooled = [{**cell, "group": ALL} for cell in by_cell]
    return {
        "format": FORMAT,
        **identity,
        "model": _last_part(str(run.identity["model"])),
        "unit": run.unit,
        "command": command_of(run),
        "methods": {label: run.methods[label] for label in run.methods if any(cell["method"] == label for cell in cells)},
        "skipped": run.skipped,
        "origins": run.origins,
        "rows": _rows(run, by_cell),
        "overall": _rows(run, pooled),
        "lengths": _lengths(run, by_cell),
    }


def summary_text(document: dict[str, Any]) -> str:
    """Return the JSON text of a summary: one line per key and per row, for readable differences."""
    entries = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n".join(f"  {_json(row)}" for row in value)
            entries.append(f"{_json(key)}: [\n{lines}\n ]")
        elif isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            lines = ",\n".join(f"  {_json(name)}: {_json(inner)}" for name, inner in value.items())
            entries.append(f"{_json(key)}: {{\n{lines}\n }}")
        else:
            entries.append(f"{_json(key)}: {_json(value)}")
    return "{\n " + ",\n ".join(entries) + "\n}\n"


def read_summary(path: Path) -> dict[str, Any]:
    """Read a summary.

    Raises:
        EvaluationError: the file is missing, or no summary of this version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise EvaluationError(f"{path} is no summary of format {FORMAT}. Write it with: specache eval report DIR --summary {path}")
    return document


def command_of(run: Run, out: str = "DIR") -> str:
    """Return a command that measures all cells of a run.

    It names only settings that differ from the defaults; of paths, their last part. The sweep of an
    ablation is written as methods.

    Raises:
        ConfigError: the task no longer exists.
    """
    identity, settings, task = run.identity, run.identity["settings"], run.task
    if task == "ablate":
        task, settings = settings["task"], settings["options"]
    methods = ",".join(label.replace(" ", ":") for label in run.methods)
    arguments = ["specache", "eval", task, "-m", _last_part(str(identity["model"]))]
    arguments += _task_options(catalogue.task_class(task), settings)
    arguments += ["--seed", str(identity["seed"])] if identity.get("seed") else []
    arguments += ["--dtype", identity["dtype"]] if identity.get("dtype", _DEFAULT_DTYPE) != _DEFAULT_DTYPE else []
    for name in ("weights", "system"):
        arguments += [f"--{name}", identity[name]] if identity.get(name) is not None else []
    if variables := identity.get("chat_template_kwargs"):
        arguments += ["--chat-template-kwargs", json.dumps(variables)]
    return shlex.join([*arguments, "--methods", methods, "--out", out])


def _task_options(cls: Any, settings: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for field in dataclasses.fields(cls):
        if field.name not in settings or field.name == "seed":  # the seed is an option of every evaluation
            continue
        value, default = settings[field.name], _default(field)
        if value == (list(default) if isinstance(default, tuple) else default):
            continue
        name = flag(field.name)
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            arguments += [f"--{name}", shown([_last_part(one) for one in value] if isinstance(value, list) else _last_part(value))]
    return arguments


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _rows(run: Run, cells: list[Cell]) -> list[Row]:
    measured: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        measured.setdefault((cell["group"], cell["method"]), []).append(cell)
    rows = []
    for row in aggregate(run, cells):
        of_row = measured[row["task"], row["method"]]
        kept = {key: value for key, value in row.items() if value is not None and key not in _LEFT_OUT}
        tokens = [count for cell in of_row if (count := _prompt_tokens(cell)) is not None]
        if tokens:
            kept["prompt_tokens"] = [min(tokens), max(tokens)]
        kept["commit"] = ", ".join(dict.fromkeys(cell["commit"] for cell in of_row))
        rows.append(_rounded(kept))
    return rows


def _lengths(run: Run, cells: list[Cell]) -> list[Row]:
    counts = {(cell["group"], cell["method"]): 0 for cell in cells}
    for cell in cells:
        counts[cell["group"], cell["method"]] += 1
    if is_score(run) or max(counts.values()) > MOST_LENGTHS:
        return []
    return [
        _rounded(
            {
                "task": cell["group"],
                "method": cell["method"],
                "prompt_tokens": _prompt_tokens(cell),
                "mean": sum(cell["values"]) / len(cell["values"]),
                "fast_ratio": cell["stats"]["fast_ratio"],
                "hot_ratio": cell["stats"]["hot_ratio"],
                "commit": cell["commit"],
            }
        )
        for cell in cells
        if _prompt_tokens(cell) is not None
    ]


def _prompt_tokens(cell: Cell) -> int | None:
    """Return the prompt's tokens. Cells of earlier versions have them only if the task said it."""
    count = cell.get("prompt_tokens", cell["facts"].get("tokens"))
    return count if isinstance(count, int) else None


def _commit(run: Run, cell: Cell) -> str | None:
    origin = cell.get("origin")
    if not isinstance(origin, int) or not 0 <= origin < len(run.origins):
        return None
    return run.origins[origin].get("commit")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return {key: _rounded(one) for key, one in value.items()} if isinstance(value, dict) else value


def _last_part(value: Any) -> Any:
    """Return a path's last part; other values, a hub's `owner/name` among them, unchanged."""
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or value.lower().endswith(".gguf")):
        return Path(value).name
    return value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"a figure is not a finite number: {error}") from error
