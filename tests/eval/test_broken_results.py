"""Result folders that were edited, merged or damaged are refused by line and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specache.errors import EvaluationError
from specache.eval.compare_runs import compare_runs
from specache.eval.report import rebuild_report
from specache.eval.results import CELLS_FILE, RUN_FILE
from specache.eval.run_summary import summarise
from tests.eval.result_folders import write_run

READERS: list[Callable[[Path], Any]] = [rebuild_report, summarise, lambda folder: compare_runs(folder, folder)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    values = {"text/0": [0.1, 0.2], "text/1": [0.3, 0.4]}
    return write_run(tmp_path / "run", {"full": {item: [0.0, 0.0] for item in values}, "kivi": values})


def refusal(folder: Path) -> str:
    """Return what every reader of a folder says. It is the same, and changes nothing."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = set()
    for read in READERS:
        with pytest.raises(EvaluationError) as refused:
            read(folder)
        said.add(str(refused.value))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (message,) = said
    return message


def test_an_item_that_is_there_twice_does_not_count_twice(folder: Path):
    path = folder / CELLS_FILE
    path.write_bytes(path.read_bytes() * 2)
    assert "line 5 has item 'text/0' under 'full' again, after line 1" in refusal(folder)


def test_results_of_a_method_that_the_run_does_not_name_are_not_left_out(folder: Path):
    lines = (folder / CELLS_FILE).read_text().splitlines(keepends=True)
    moved = [line.replace('"method": "kivi"', '"method": "h2o"') for line in lines]
    (folder / CELLS_FILE).write_text("".join(lines + moved[2:]))
    assert "has results of 'h2o', which run.json does not name" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("item", 3),
        ("group", ["text"]),
        ("index", "first"),
        ("method", None),
        ("values", ["0.1", "0.2"]),
        ("values", 1.0),
        ("tokens", {"top1": [[1], 1]}),
        ("stats", None),
        ("stats", {"fast_ratio": "x", "hot_ratio": 0.0}),
        ("stats", {"fast_ratio": 1.0, "hot_ratio": 0.0, "hit_rate": "x"}),
        ("facts", None),
        ("seconds", "long"),
    ],
)
def test_a_field_that_cannot_be_a_result_is_named(folder: Path, field: str, value: Any):
    lines = [json.loads(line) for line in (folder / CELLS_FILE).read_text().splitlines()]
    lines[1][field] = value
    (folder / CELLS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refusal(folder)
    assert f"line 2 is no result: {field}" in message and "cannot be what was measured" in message


def test_figures_that_are_not_finite_or_not_as_many_are_refused(folder: Path):
    text = (folder / CELLS_FILE).read_text()
    (folder / CELLS_FILE).write_text(text.replace("0.4", "NaN"))
    assert "line 4 is no result: NaN is no number" in refusal(folder)
    (folder / CELLS_FILE).write_text(text.replace('"tokens": {}', '"tokens": {"top1": [1.0]}'))
    assert "line 1 is no result: it has more figures of one kind than of another" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", 1),
        ("settings", [1]),
        ("seed", None),
        ("unit", []),
        ("methods", 1.5),
        ("methods", {"full": {}, "kivi": {}}),
        ("skipped", 1.5),
        ("origins", ["abc"]),
        ("origins", True),
        ("began", "yesterday"),
    ],
)
def test_a_field_that_a_run_cannot_have_is_named(folder: Path, field: str, value: Any):
    document = json.loads((folder / RUN_FILE).read_text())
    document[field] = value
    (folder / RUN_FILE).write_text(json.dumps(document))
    message = refusal(folder)
    assert "run.json is broken" in message and field in message
