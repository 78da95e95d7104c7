"""The results board matches its result files, and shows of each what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import board, board_tables, run_list
from benchmarks.board import BoardError
from benchmarks.board_tables import Result
from specache.eval import run_summary
from specache.eval.statistics import wilson
from specache.eval.tasks.needle import Needle
from tests.eval.result_folders import SCORE, write_run

EMPTY_PAGE = "Prose.\n" + "".join(f"## {name}\n\n<!-- board: {name} -->\n<!-- end of board -->\n" for name in board.SECTIONS)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "results.md").write_text(EMPTY_PAGE)
    return tmp_path / "results.md"


def add(page: Path, name: str, values, **options) -> None:
    folder = write_run(page.parent / f"out-{name}", values, **options)
    (page.parent / "results" / f"{name}.json").write_text(run_summary.summary_text(run_summary.summarise(folder)))


def fill(page: Path, **options) -> str:
    return board.fill(page, page.parent / "results", **options)


def section(page: Path, name: str) -> str:
    return page.read_text().split(f"<!-- board: {name} -->")[1].split("<!-- end of board -->")[0]


def divergence(text: float, answer: float) -> dict[str, list[float]]:
    return {"text/0": [text] * 16, "text/1": [text] * 16, "answer/0": [answer] * 16, "answer/1": [answer] * 16}


def scores(wrong: int, count: int = 40) -> dict[str, list[float]]:
    return {f"one/{number}": [float(number >= wrong)] for number in range(count)}


def test_the_page_matches_its_result_files():
    difference = board.fill(check=True)
    assert not difference, f"run: python -m benchmarks.board\n{difference}"


def test_every_listed_run_belongs_to_a_question_and_its_model_has_a_name():
    listed = run_list.read_run_list()
    assert len(listed.runs) > 10 and {run.question for run in listed.runs} <= {asked for asked, _ in board.SECTIONS.values()}
    for run in listed.runs:
        assert run.minutes > 0 and "--out" not in run.command and "--json" not in run.command
        assert set(run.needs) <= {"gemma"}, "the Makefile passes no other model"


def test_a_row_has_model_length_memory_commit_and_command(page):
    add(page, "fidelity-demo", {"specache": divergence(0.012, 0.034)})
    fill(page)
    text = section(page, "fidelity")
    row = next(line for line in text.splitlines() if "`specache`" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["SmolLM2-135M", "4,000 to 7,000", "`specache` bits=2"]
    assert cells[3:7] == ["0.012 (0.012 to 0.012)", "0.012", "0.034 (0.034 to 0.034)", "0.034"]
    assert cells[7:] == ["0.170x", "0.080x", "2", "abc1234", "[fidelity-demo](results/fidelity-demo.json)"]
    assert "specache eval fidelity -m demo --methods specache --out results/fidelity-demo" in text
    assert "# fidelity-demo: 2026-01-02, abc1234, A processor, 2 threads, avx512" in text


def test_memory_is_shown_by_length(page):
    add(page, "fidelity-demo", {"specache": divergence(0.01, 0.02), "kivi": divergence(1.0, 2.0)})
    fill(page)
    rows = [line for line in section(page, "memory").splitlines() if line.startswith("| SmolLM2")]
    assert [row.split("|")[2].strip() for row in rows] == ["4,000", "5,000", "6,000", "7,000"], "one per item of this made-up run"
    assert "| 0.170x | 0.080x | 0.250x | 0.01 | - |" in rows[0] and not any("| 1 |" in row for row in rows)


def test_another_dtype_is_named_beside_the_model(page):
    add(page, "fidelity-demo", {"specache": divergence(0.01, 0.02)}, dtype="bfloat16")
    fill(page)
    assert "| SmolLM2-135M, bfloat16 |" in section(page, "fidelity") and "--dtype bfloat16" in section(page, "fidelity")


def test_scores_show_what_is_kept_and_losses_first(page):
    add(page, "needle-demo", {"full": scores(0), "specache": scores(20), "kivi": scores(30)}, unit=SCORE)
    fill(page)
    text = section(page, "retrieval")
    assert text.index("Worse than the full cache by more than the interval") < text.index("| model |")
    assert "needle/one, `specache` bits=2: -0.500" in text and "`kivi`: -0.75" not in text, "only of what we offer"
    assert "50.0% (35.2% to 64.8%)" in text and "| 40 |" in text
    assert "all runs together" not in text


def test_without_losses_nothing_is_said_first(page):
    add(page, "needle-demo", {"full": scores(0), "specache": scores(1)}, unit=SCORE)
    fill(page)
    assert "Worse than" not in section(page, "retrieval")


def test_what_is_kept_over_all_runs_is_pooled(page):
    add(page, "needle-demo", {"full": scores(0), "specache": scores(0)}, unit=SCORE)
    add(page, "another-needle", {"full": scores(0, 120), "specache": scores(3, 120)}, unit=SCORE, seed=1)
    fill(page)
    row = next(line for line in section(page, "retrieval").splitlines() if line.startswith("| `specache` bits=2 | 2 |"))
    assert "98.1% (" in row and row.rstrip(" |").endswith("| 160")


def test_documents_that_two_runs_share_are_pooled_once(page):
    """A run of many documents by itself, and one of the first of them beside other methods."""
    add(page, "needle-many", {"full": scores(0, 120), "specache": scores(3, 120)}, unit=SCORE, task=Needle(documents=24))
    add(page, "needle-few", {"full": scores(0), "specache": scores(0)}, unit=SCORE, task=Needle(documents=8))
    fill(page)
    assert "all runs together" not in section(page, "retrieval")
    add(page, "needle-others", {"full": scores(0), "specache": scores(0)}, unit=SCORE, seed=1)
    fill(page)
    row = next(line for line in section(page, "retrieval").splitlines() if line.startswith("| `specache` bits=2 | 2 |"))
    assert row.rstrip(" |").endswith("| 160")


def test_runs_of_other_defaults_are_not_pooled(page):
    for name, k in (("needle-demo", 64), ("needle-later", 128)):
        values = {"full": scores(0), "specache": scores(1)}
        add(page, name, values, unit=SCORE, settings={"bits": 2, "top_k": k})
    fill(page)
    text = section(page, "retrieval")
    assert "`specache` bits=2 top_k=64" in text and "`specache` bits=2 top_k=128" in text and "all runs together" not in text


def test_the_pooled_interval_is_no_narrower_than_of_all_items_together():
    parts = [(40, 40), (118, 120), (300, 301)]
    rows = []
    for right, trials in parts:
        one = wilson(right, trials)
        rows.append({"kept": one.value, "kept_ci95": one.interval, "kept_n": trials})
    share, low, high = board_tables.pooled(rows)
    together = wilson(458, 461)
    assert share == pytest.approx(together.value) and 0.95 < low <= together.low + 0.002 and share < high <= 1.0


def test_tables_of_speed_have_the_ratios_of_their_run():
    rows = [
        {"impl": "dynamic", "cache": "bf16", "context": 8000, "ms_per_step": 68.0, "vs_dynamic": 1.0},
        {"impl": "specache", "cache": "2-bit", "context": 8000, "ms_per_step": 27.7, "vs_dynamic": 2.4549},
        {"impl": "llama.cpp", "cache": "f16", "context": 8000, "ms_per_step": None, "vs_dynamic": None, "skipped": "missing"},
    ]
    document = {"results": rows, "origins": [{"commit": "abc1234"}], "command": "specache bench decode"}
    text = board_tables.speed([Result("decode-demo", "SmolLM2", document)])
    assert "| specache | 2-bit | 8,000 | 27.7 | 2.5x |\n| dynamic | bf16 | 8,000 | 68 | 1x |\n" in text and "llama" not in text


def test_check_finds_a_changed_figure_and_writes_nothing(page):
    add(page, "fidelity-demo", {"specache": divergence(0.012, 0.034)})
    fill(page)
    assert fill(page, check=True) == ""
    page.write_text(page.read_text().replace("0.012 (", "0.011 ("))
    changed = page.read_text()
    difference = fill(page, check=True)
    assert "-| SmolLM2-135M" in difference and "+| SmolLM2-135M" in difference and page.read_text() == changed
    fill(page)
    assert "0.011 (" not in page.read_text()


def test_prose_is_kept(page):
    add(page, "fidelity-demo", {"specache": divergence(0.012, 0.034)})
    fill(page)
    assert page.read_text().startswith("Prose.\n## fidelity\n\n<!-- board: fidelity -->\n")
    assert section(page, "speed").strip() == board_tables.NONE_YET.strip()


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (EMPTY_PAGE.replace("<!-- end of board -->", "", 1), "has no end"),
        (EMPTY_PAGE.replace("board: speed", "board: haste"), "one section for each of"),
        ("nothing", "it has none"),
    ],
)
def test_a_page_without_its_sections_is_refused(page, broken, expected):
    page.write_text(broken)
    with pytest.raises(BoardError, match=expected):
        fill(page)


def test_a_file_that_answers_no_question_is_refused(page):
    (page.parent / "results" / "strange.json").write_text(json.dumps({"format": 1, "task": "juggling", "model": "demo"}))
    with pytest.raises(BoardError, match=r"strange.json answers no question .* 'juggling'"):
        fill(page)
    (page.parent / "results" / "strange.json").write_text("{")
    with pytest.raises(BoardError, match="cannot read"):
        fill(page)


def test_check_has_an_exit_code(page, monkeypatch):
    defaults = (page, page.parent / "results", run_list.FILE)
    monkeypatch.setattr(board.fill, "__defaults__", defaults)
    assert CliRunner().invoke(board.app, ["--check"]).exit_code == 1
    assert CliRunner().invoke(board.app, []).exit_code == 0
    assert CliRunner().invoke(board.app, ["--check"]).exit_code == 0
    page.write_text("nothing")
    assert CliRunner().invoke(board.app, []).exit_code == 2
