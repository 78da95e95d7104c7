"""`specache eval report`: one run's report or summary, or the comparison of two runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specache.cli.console import EXIT_ERROR, err, print_error, print_table
from specache.cli.evaluation_table import result_tables
from specache.cli.json_file import check_json, write_json
from specache.errors import ConfigError
from specache.platform.output_files import check_output_file

if TYPE_CHECKING:
    from specache.eval.compare_runs import Change, Comparison

_BY_CHANCE = 0.05  # share of figures that leave a 95% interval although nothing changed
_COLOURS = {"better": "green", "worse": "red"}

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The --out of an earlier run.")]
OtherFolder = Annotated[
    Path | None, typer.Argument(metavar="OTHER", help="A later run of the same task: shows what moved from DIR to OTHER.")
]
SummaryFile = Annotated[
    Path | None,
    typer.Option("--summary", metavar="FILE", help="Write one small JSON file of DIR, for the results board, and nothing else."),
]
Commit = Annotated[
    str | None, typer.Option("--commit", help="For --summary: the commit that measured cells which do not say it themselves.")
]
Ignore = Annotated[
    str, typer.Option("--ignore", metavar="LIST", help="With OTHER: settings that may differ between the runs, for example dtype.")
]
JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="With OTHER: write the comparison as JSON ('-': standard output).")
]
Everything = Annotated[bool, typer.Option("--all", help="With OTHER: also show figures that did not move.")]
FailOnRegression = Annotated[
    bool, typer.Option("--fail-on-regression", help="With OTHER: exit code 1 if a figure became worse beyond its interval.")
]


def report(
    folder: Folder,
    other: OtherFolder = None,
    summary: SummaryFile = None,
    commit: Commit = None,
    ignore: Ignore = "",
    everything: Everything = False,
    json: JsonFile = None,
    fail_on_regression: FailOnRegression = False,
) -> None:
    """Make a run's report again from its finished cells, or compare two runs.

    With two folders: what moved beyond its 95% interval, and what only one of them has.
    """
    check_json(json)
    if other is None:
        if ignore or everything or fail_on_regression or json is not None:
            raise ConfigError("--ignore, --all, --json and --fail-on-regression compare two runs: name a second folder.")
        _one(folder, summary, commit)
        return
    if summary is not None or commit is not None:
        raise ConfigError("--summary and --commit are for one run: name one folder.")
    _two(folder, other, ignore, everything, json, fail_on_regression)


def _one(folder: Path, summary: Path | None, commit: str | None) -> None:
    if summary is None:
        if commit is not None:
            raise ConfigError("--commit is for --summary.")
        from specache.eval.report import rebuild_report

        path, run, rows = rebuild_report(folder)
        print_table(result_tables(run, rows))
        err.print(f"Report: {path}", style="dim", markup=False, soft_wrap=True)
        return
    from specache.eval.results import write_file
    from specache.eval.run_summary import summarise, summary_text

    check_output_file(summary, "--summary")
    write_file(summary, summary_text(summarise(folder, commit=commit)))
    err.print(f"Summary: {summary}", style="dim", markup=False, soft_wrap=True)


def _two(before: Path, after: Path, ignore: str, everything: bool, json: str | None, fail_on_regression: bool) -> None:
    from specache.eval.compare_runs import compare_runs

    comparison = compare_runs(before, after, [name.strip().replace("-", "_") for name in ignore.split(",") if name.strip()])
    print_table(comparison_table(comparison, everything))
    if json is not None:
        write_json(json, comparison.to_dict())
    if fail_on_regression and comparison.worse:
        print_error(f"{len(comparison.worse)} figures became worse beyond their intervals (--fail-on-regression).")
        raise typer.Exit(EXIT_ERROR)


def comparison_table(comparison: Comparison, everything: bool = False) -> RenderableType:
    """Return the changes that moved (or all), what only one run has, and notes."""
    shown = comparison.changes if everything else comparison.moved
    count, moved = len(comparison.changes), len(comparison.moved)
    parts: list[RenderableType] = [_changes_table(shown)] if shown else []
    paired = sum(change.basis == "paired" for change in comparison.changes)
    parts.append(
        Text(
            f"{moved} of {count} figures moved beyond their 95% intervals. Of the {paired} paired ones, "
            f"about {_BY_CHANCE * paired:.1f} would do so by chance."
        )
    )
    if any(change.basis == "intervals" and change.figure != "memory" for change in comparison.changes):
        why = "intervals: the items, or what the full cache gets right of them, are not the same"
        parts.append(Text(f"{why}, so two intervals are compared; only large changes are noticed."))
    for title, rows in (("before", comparison.only_before), ("after", comparison.only_after)):
        parts += [Text(f"only {title}: {task}, {method}", style="yellow") for task, method in rows]
    parts += [Text(note, style="yellow") for note in comparison.notes]
    return Group(*parts)


def _changes_table(changes: list[Change]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("task", "method", "figure"):
        table.add_column(title, overflow="fold")
    for title in ("before", "after", "difference", "95%", "items"):
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("by")
    table.add_column("")
    for change in changes:
        interval = "-" if change.ci95 is None else f"{change.ci95[0]:+.3g} to {change.ci95[1]:+.3g}"
        figures = (f"{change.before:.3g}", f"{change.after:.3g}", f"{change.difference:+.3g}", interval, str(change.items))
        basis = "-" if change.figure == "memory" else change.basis
        verdict = Text(change.verdict, style=_COLOURS.get(change.verdict, "dim"))
        table.add_row(change.task, change.method, change.figure, *figures, basis, verdict)
    return table
