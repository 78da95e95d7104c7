"""Fill the tables of docs/results.md from the result files in docs/results/.

    python -m benchmarks.board            # write the tables
    python -m benchmarks.board --check    # exit code 1 if the page does not match the files

A table lies between `<!-- board: NAME -->` and `<!-- end of board -->`; everything else on the page
is prose. A result file is a summary: `specache eval report DIR --summary docs/results/NAME.json`
writes it, `make results` for every run of `benchmarks/runs.toml`. The question that a file answers
is the one which `runs.toml` has for its name, else the one of its task.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import board_tables
from benchmarks.board_tables import Result
from benchmarks.run_list import FILE, RunListError, read_run_list
from specache.errors import EvaluationError
from specache.eval.run_summary import read_summary

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "docs" / "results"
QUESTION_OF_TASK = {
    "fidelity": "fidelity",
    "perplexity": "fidelity",
    "needle": "retrieval",
    "ruler": "retrieval",
    "retrieval": "retrieval",
    "extract": "context",
    "multi-needle": "context",
    "table": "context",
    "compare": "context",
    "longbench": "context",
    "ablate": "ablations",
    "code-variants": "variants",
    "bench": "speed",
}
SECTIONS: dict[str, tuple[str, Callable[[list[Result]], str]]] = {  # marker -> question of its files, and their tables
    "fidelity": ("fidelity", board_tables.fidelity),
    "memory": ("fidelity", board_tables.memory),
    "retrieval": ("retrieval", board_tables.scores),
    "context": ("context", board_tables.scores),
    "ablations": ("ablations", board_tables.fidelity),
    "variants": ("variants", board_tables.variants),
    "speed": ("speed", board_tables.speed),
}
_SECTION = re.compile(r"(<!-- board: (\w+) -->\n)(.*?)(<!-- end of board -->)", re.S)

app = typer.Typer(add_completion=False)


class BoardError(ValueError):
    """The page or a result file is wrong. The message says which, and what to do."""


def read_results(folder: Path = RESULTS, run_list: Path = FILE) -> dict[str, list[Result]]:
    """Return question -> result files, in the order of `runs.toml`, then by name.

    Raises:
        BoardError: a file cannot be read, or answers no question of the board.
    """
    try:
        listed = read_run_list(run_list)
    except RunListError as error:
        raise BoardError(str(error)) from None
    order = {run.name: place for place, run in enumerate(listed.runs)}
    questions = {run.name: run.question for run in listed.runs}
    found: dict[str, list[Result]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (order.get(path.stem, len(order)), path.stem)):
        try:
            document = read_summary(path)
        except EvaluationError as error:
            raise BoardError(str(error)) from None
        question = questions.get(path.stem) or QUESTION_OF_TASK.get(str(document.get("task")))
        if question not in {asked for asked, _ in SECTIONS.values()}:
            raise BoardError(
                f"{path} answers no question of the board (task {document.get('task')!r}). Name its question in {run_list}, "
                "or add its task to QUESTION_OF_TASK in benchmarks/board.py."
            )
        model = str(document.get("model"))
        found.setdefault(question, []).append(Result(path.stem, listed.models.get(model, model), document))
    return found


def filled(page: str, results: dict[str, list[Result]]) -> str:
    """Return the page with all of its tables written anew.

    Raises:
        BoardError: a section of the page is unknown, missing or there twice; or a result file lacks
            a figure.
    """
    names = [match[2] for match in _SECTION.finditer(page)]
    if page.count("<!-- board:") != len(names) or page.count("<!-- end of board -->") != len(names):
        raise BoardError("a section of the page has no end, or an end no section: <!-- board: NAME --> ... <!-- end of board -->.")
    if sorted(names) != sorted(SECTIONS):
        raise BoardError(f"the page must have one section for each of {', '.join(SECTIONS)}; it has {', '.join(names) or 'none'}.")

    def section(match: re.Match[str]) -> str:
        question, tables = SECTIONS[match[2]]
        try:
            text = tables(results.get(question, []))
        except (KeyError, TypeError, IndexError) as error:
            raise BoardError(
                f"a result file of the question {question!r} lacks {error}. Write it again from its folder."
            ) from error
        return f"{match[1]}\n{text or board_tables.NONE_YET}\n{match[4]}"

    return _SECTION.sub(section, page)


def fill(page: Path = PAGE, results: Path = RESULTS, run_list: Path = FILE, *, check: bool = False) -> str:
    """Write the page's tables, or with `check` only compare them -> what differs, as a diff.

    Raises:
        BoardError: as `filled` and `read_results`.
    """
    before = page.read_text(encoding="utf-8")
    after = filled(before, read_results(results, run_list))
    if after != before and not check:
        page.write_text(after, encoding="utf-8")
    lines = (text.splitlines(keepends=True) for text in (before, after))
    return "".join(difflib.unified_diff(*lines, str(page), f"{page} from {results}"))


@app.command()
def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if the page does not match.")] = False,
) -> None:
    """Fill the tables of docs/results.md from docs/results/."""
    try:
        difference = fill(check=check)
    except BoardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if check and difference:
        typer.echo(difference)
        typer.echo("error: docs/results.md does not match docs/results/. Run: python -m benchmarks.board", err=True)
        raise typer.Exit(1)
    typer.echo("docs/results.md matches its result files." if check or not difference else "docs/results.md is written.")


if __name__ == "__main__":
    app()
