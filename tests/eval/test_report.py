"""The report: self-contained, clear about memory, and rebuilt from the cells alone."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specache.errors import ConfigError, EvaluationError
from specache.eval import catalogue, plots, report
from specache.eval.columns import with_margin
from specache.eval.results import Run, open_results
from specache.eval.table_rows import aggregate, is_score
from tests.eval.fake_tasks import AnswerScores, Divergence

PNG = b"\x89PNG\r\n\x1a\n"
METHODS = {
    "full": {"name": "full", "settings": {}},
    "specache": {"name": "specache", "settings": {"bits": 2}},
    "specache <bits>=1": {"name": "specache", "settings": {"bits": 1}},
    "h2o": {"name": "h2o", "settings": {"budget": 0.2}},
}
MEMORY = {"full": (1.0, 0.0), "specache": (0.17, 0.08), "specache <bits>=1": (0.11, 0.08), "h2o": (0.252, 0.0)}


def cells_of(unit: str, groups: tuple[str, ...] = ("one", "two")) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    cells = []
    for index in range(6):
        for label, (fast, hot) in MEMORY.items():
            divergence = [0.0] * 32 if label == "full" else rng.exponential(0.01, 32).tolist()
            values = [float(rng.random() < 0.8)] if unit == "score" else divergence
            cells.append(
                {
                    "item": f"item/{index}",
                    "group": groups[index % len(groups)],
                    "index": index,
                    "method": label,
                    "values": values,
                    "tokens": {} if unit == "score" else {"top1": [1.0] * 32, "nll": [2.0] * 32},
                    "details": {},
                    "facts": {},
                    "stats": {"fast_ratio": fast, "hot_ratio": hot, "hit_rate": None, "guess_rate": None},
                    "seconds": 1.0,
                }
            )
    return cells


def run_of(unit: str, task: Any) -> Run:
    identity = {"task": task.name, "settings": task.settings(), "model": "a <b>bold</b> model", "fingerprint": "f"}
    return Run({**identity, "dtype": "float32", "seed": 0}, unit, METHODS, {"quantized": "hqq <is> missing"})


@pytest.fixture(params=["KL, nats", "NLL, nats", "score"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    unit = request.param
    run, cells = run_of(unit, AnswerScores() if unit == "score" else Divergence()), cells_of(unit)
    report.write_report(tmp_path, None, run, aggregate(run, cells), cells)
    return tmp_path


def test_the_html_report_is_self_contained(written: Path):
    html = (written / report.REPORT_FILE).read_text()
    assert not re.search(r"https?:|<script|<link|@import", html)
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    files = sorted(written.glob("*.png"))
    assert len(files) >= 2 and all(file.read_bytes().startswith(PNG) for file in files)
    assert sorted(embedded) == sorted(file.read_bytes() for file in files)


def test_external_text_is_escaped(written: Path):
    html = (written / report.REPORT_FILE).read_text()
    assert "&lt;b&gt;bold&lt;/b&gt; model" in html and "<b>bold" not in html
    assert "specache &lt;bits&gt;=1" in html and "hqq &lt;is&gt; missing" in html


def test_more_and_less_memory_are_marked(written: Path):
    html = (written / report.REPORT_FILE).read_text()
    names = ("full", "h2o", "specache", "specache &lt;bits&gt;=1")
    row = {name: html.split(f"<td>{name}</td>")[1].split("</tr>")[0] for name in names}
    assert "MORE MEMORY" in row["full"]
    assert "same memory" in row["h2o"] and "same memory" in row["specache"], "0.252 is within 2% of 0.25"
    assert "less memory" in row["specache &lt;bits&gt;=1"]


def test_rows_are_written_as_json_lines(written: Path):
    rows = [json.loads(line) for line in (written / report.ROWS_FILE).read_text().splitlines()]
    assert [(row["task"], row["method"]) for row in rows] == [(group, method) for group in ("one", "two") for method in METHODS]


def test_no_temporary_file_is_left(written: Path):
    assert {file.suffix for file in written.iterdir()} == {".html", ".jsonl", ".png"}


def test_a_task_draws_its_own_plots(tmp_path: Path):
    class Drawing(AnswerScores):
        def figures(self, rows, cells):
            assert len(rows) == 8 and len(cells) == 24
            figure = plots.new_figure(3, 2)
            figure.subplots().plot([1, 2])
            return {"heat map/of ours": figure}

    run, cells = run_of("score", AnswerScores()), cells_of("score")
    report.write_report(tmp_path, Drawing(), run, aggregate(run, cells), cells)
    assert [file.name for file in tmp_path.glob("*.png")] == ["heat-map-of-ours.png"]
    assert "heat-map-of-ours.png" in (tmp_path / report.REPORT_FILE).read_text()


def test_a_report_is_rebuilt_from_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(catalogue.TASKS, "divergence", "tests.eval.fake_tasks:Divergence")
    with pytest.raises(EvaluationError, match="holds no results"):
        report.rebuild_report(tmp_path)
    task = Divergence(names=("one", "two"))
    run = run_of(task.unit, task)
    with open_results(tmp_path, run) as results:
        with pytest.raises(EvaluationError, match="no finished cells"):
            report.rebuild_report(tmp_path)
        for cell in cells_of(task.unit):
            results.append(cell)
    before = (tmp_path / "cells.jsonl").read_bytes()
    path, read, rows = report.rebuild_report(tmp_path)
    assert report.task_of(read) == task and not is_score(read)
    assert path.is_file() and len(rows) == 8 and (tmp_path / "cells.jsonl").read_bytes() == before


def test_no_two_methods_have_the_same_style():
    looks = [plots.style(number) for number in range(100)]
    assert len({(look.colour, look.marker) for look in looks}) == len(looks)
    lines = [(look.colour, look.line) for look in looks[:40]]
    assert len(set(lines)) == len(lines), "lines have no markers"


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"matplotlib and jinja2.*pip install 'specache\[eval\]'"):
        report.write_report(tmp_path, None, run_of("score", AnswerScores()), [], [])


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (0.00213, [0.0017, 0.0026], "0.00213 ± 0.00047"),
        (0.5, [0.3, 0.6], "0.50 ± 0.20"),
        (12.345, [11.0, 13.0], "12.3 ± 1.3"),
        (0.0, [0.0, 0.0], "0"),
        (3e-8, [1e-8, 5e-8], "3e-08 ± 2e-08"),
        (None, None, "-"),
    ],
)
def test_values_are_rounded_to_their_margin(value, interval, text):
    assert with_margin(value, interval) == text
