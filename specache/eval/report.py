"""Write a run's report: `rows.jsonl`, one self-contained `report.html`, and every plot as a PNG.

A task may draw its own plots with `figures(rows, cells) -> {name: matplotlib figure}`, where `rows`
come from `table_rows.aggregate` and `cells` are the lines of `cells.jsonl`. Otherwise the plots are
those of `plots.default_figures`.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from specache.errors import EvaluationError
from specache.eval import catalogue, plots
from specache.eval.columns import columns, interval_text
from specache.eval.results import WEIGHTS_DIGEST, Cell, Run, read_results, write_file
from specache.eval.setting_fields import from_json, shown
from specache.eval.table_rows import LESS, MORE, Row, aggregate, is_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = "report.html"
ROWS_FILE = "rows.jsonl"
_TEMPLATE = Path(__file__).with_name("report.html.j2")


@runtime_checkable
class HasFigures(Protocol):
    """A task with plots of its own."""

    def figures(self, rows: list[Row], cells: list[Cell]) -> dict[str, Figure]:
        """Return plots by name. The name is also the file's."""


def write_report(folder: Path, task: Any, run: Run, rows: list[Row], cells: list[Cell]) -> Path:
    """Write all files of a report, each atomically -> the HTML file.

    Raises:
        ConfigError: matplotlib or jinja2 is missing.
        EvaluationError: a file cannot be written. The cells are kept.
    """
    plots.require_libraries()
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_file(folder / ROWS_FILE, lines)
    images = {name: plots.png(figure) for name, figure in _figures(task, rows, cells).items()}
    for name, data in images.items():
        write_file(folder / f"{name}.png", data)
    write_file(folder / REPORT_FILE, _html(run, rows, cells, images))
    return folder / REPORT_FILE


def rebuild_report(folder: Path) -> tuple[Path, Run, list[Row]]:
    """Write the report of a folder's finished cells again, without measuring anything.

    Raises:
        EvaluationError: the folder holds no results.
    """
    run, cells = read_results(folder)
    rows = aggregate(run, cells)
    if not rows:
        raise EvaluationError(f"{folder} holds no finished cells yet.")
    return write_report(folder, task_of(run), run, rows, cells), run, rows


def task_of(run: Run) -> Any:
    """Return the task of a run.

    Raises:
        ConfigError: the task no longer exists, or has other settings now.
    """
    if run.task == "ablate":
        from specache.eval.tasks.ablate import Ablate

        return Ablate.from_settings(run.identity["settings"])
    return from_json(catalogue.task_class(run.task), run.identity["settings"])


def _figures(task: Any, rows: list[Row], cells: list[Cell]) -> dict[str, Figure]:
    drawn = task.figures(rows, cells) if isinstance(task, HasFigures) else plots.default_figures(rows, cells)
    return {re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "plot": figure for name, figure in drawn.items()}


def _html(run: Run, rows: list[Row], cells: list[Cell], images: dict[str, bytes]) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        run=run,
        facts={key: value for key, value in run.identity.items() if key not in ("settings", "fingerprint", WEIGHTS_DIGEST)},
        settings={key: shown(value) for key, value in run.identity["settings"].items()},
        tables=_tables(rows),
        meanings=[(column.title, column.meaning) for column in columns(rows)],
        notes=_notes(run, rows),
        images=[(name, base64.b64encode(data).decode()) for name, data in images.items()],
        cells=len(cells),
        seconds=sum(cell["seconds"] for cell in cells),
    )


def _tables(rows: list[Row]) -> list[dict[str, Any]]:
    """Return one table per group, as text."""
    shown_columns = columns(rows)
    tables = []
    for group in dict.fromkeys(row["task"] for row in rows):
        lines = [
            {
                "method": row["method"],
                "memory": {MORE: "more", LESS: "less"}.get(row["memory"], ""),
                "texts": [(column.title, column.text(row), interval_text(column.margin(row))) for column in shown_columns],
            }
            for row in rows
            if row["task"] == group
        ]
        tables.append({"group": group, "titles": [column.title for column in shown_columns], "lines": lines})
    return tables


def _notes(run: Run, rows: list[Row]) -> list[str]:
    notes = ["Every figure has its 95% confidence interval: ± is its longer side, both ends show when the pointer rests on it."]
    if is_score(run):
        notes.append("Bootstrap over items; the Wilson interval for shares and for scores of 0 and 1.")
    else:
        notes.append("Bootstrap over items and, within each, over blocks of 16 successive tokens.")
        if any(row["n"] == 1 for row in rows):
            notes.append("A single item's interval says how its tokens vary, not how other items would.")
    if any(row["memory"] == MORE for row in rows):
        notes.append(
            "MORE MEMORY: the method holds over 2% more fast memory than specache here; that is no comparison at equal memory."
        )
    if any(row["memory"] == LESS for row in rows):
        notes.append("Less memory: the method holds over 2% less fast memory than specache here.")
    return notes + [f"{label} was skipped: {reason}" for label, reason in run.skipped.items()]
