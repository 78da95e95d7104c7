"""Format the result of an evaluation as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specache.eval.columns import columns
from specache.eval.table_rows import MORE

if TYPE_CHECKING:
    from specache.eval.results import Run
    from specache.eval.table_rows import Row


def result_tables(run: Run, rows: list[Row]) -> RenderableType:
    """Return one table per group of items, one line per method, with 95% confidence intervals."""
    parts: list[RenderableType] = []
    for group in dict.fromkeys(row["task"] for row in rows):
        parts += [Text(), _table(group, [row for row in rows if row["task"] == group])]
    if any(row["memory"] == MORE for row in rows):
        parts.append(Text("MORE MEMORY: over 2% more fast memory than specache; no comparison at equal memory.", style="yellow"))
    parts += [Text(f"{label} was skipped: {reason}", style="yellow") for label, reason in run.skipped.items()]
    return Group(*parts)


def _table(group: str, rows: list[Row]) -> Table:
    shown = columns(rows)
    table = Table(title=Text(group, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    longest_word = max(len(word) for row in rows for word in row["method"].split())
    table.add_column("method", style="bold", min_width=longest_word)
    for column in shown:
        table.add_column(column.title, justify="right", overflow="fold")
    for row in rows:
        style = "yellow" if row["memory"] == MORE else ""
        table.add_row(row["method"], *(column.text(row) for column in shown), style=style)
    return table
