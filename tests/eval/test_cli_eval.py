"""`specache eval`: a command per task, results in the folder, exit codes and messages."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from specache.cli import console
from specache.errors import EvaluationError
from specache.eval import catalogue
from specache.eval.tasks import ablate
from tests.cli.running import one_line, run
from tests.eval import fake_tasks
from tests.eval.fake_tasks import calls

MODULE = "tests.eval.fake_tasks"
SMALL = ("--items-per-group", "1", "--names", "text", "--length", "220")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register only quick tasks: the real tasks' files are not tested here."""
    monkeypatch.setattr(catalogue, "TASKS", {"divergence": f"{MODULE}:Divergence", "answers": f"{MODULE}:AnswerScores"})
    monkeypatch.setitem(catalogue.METHODS, "missing", f"{MODULE}:MissingMethod")
    calls.clear()


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    return ("-m", str(tiny_folder), "--threads", "1", "--out", str(tmp_path / "out"))


def evaluate(task: str, *arguments: str | Path, code: int = 0) -> Any:
    return run("eval", task, *arguments, code=code)


def test_list_shows_tasks_and_methods():
    text = one_line(run("eval", "list").stdout)
    assert "divergence along random tokens" in text and "ablate" in text and "the ordinary 16-bit cache" in text
    document = json.loads(run("eval", "list", "--json").stdout)
    assert [task["name"] for task in document["tasks"]] == ["divergence", "answers", "ablate"]
    assert {method["name"] for method in document["methods"]} == set(catalogue.METHODS)
    assert "top_k" in next(method for method in document["methods"] if method["name"] == "specache")["settings"]


def test_help_names_every_task_and_its_options():
    assert all(name in run("eval", "--help").stdout for name in ("list", "report", "divergence", "answers", "ablate"))
    text = one_line(run("eval", "divergence", "--help").stdout)
    assert "divergence along random tokens" in text and "--items-per-group" in text and "prompt tokens" in text
    assert "text,answer" in text and "[default: 420]" in text and "[default: float32]" in text
    text = one_line(run("eval", "answers", "--help").stdout)
    assert text.count("--seed") == 1 and "--no-easy" in text


def test_ablate_has_the_options_of_the_task_it_sweeps():
    assert "--items-per-group" in run("eval", "ablate", "--help").stdout
    text = run("eval", "ablate", "--task", "answers", "--help").stdout
    assert "--count" in text and "--items-per-group" not in text


def test_json_on_standard_output_and_a_table_on_standard_error(tiny, tmp_path):
    result = evaluate("divergence", *tiny, *SMALL, "--json", "-")
    document = json.loads(result.stdout)
    assert set(document) == {"rows", "run"}
    assert [row["method"] for row in document["rows"]] == ["full", "specache", "kivi"]
    keys = {"task", "config", "n", "mean", "ci95", "p95", "p99", "fast_ratio", "hot_ratio", "hit_rate", "guess_rate"}
    assert all(row.keys() >= keys for row in document["rows"])
    assert document["run"]["settings"]["length"] == 220 and document["run"]["dtype"] == "float32"
    assert "±" in result.stderr and "memory" in result.stderr and "report.html" in result.stderr
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} >= {"run.json", "cells.jsonl", "rows.jsonl", "report.html", "mean.png", "tail.png"}


def test_options_reach_the_task(tiny, tmp_path):
    file = tmp_path / "rows.json"
    evaluate("answers", *tiny, "--count", "3", "--seed", "7", "--easy", "--methods", "kivi", "--json", file)
    document = json.loads(file.read_text())
    assert document["run"]["settings"] == {"count": 3, "seed": 7, "easy": True} and document["run"]["seed"] == 7
    assert document["rows"][0]["mean"] == 1.0 and document["rows"][0]["n"] == 3


def test_results_over_quantised_weights_do_not_mix_with_others(tiny, tmp_path):
    arguments = (*tiny, "--methods", "kivi")
    evaluate("answers", *arguments)
    text = one_line(evaluate("answers", *arguments, "--weights", "int8", code=console.EXIT_ERROR).stderr)
    assert 'weights is null there and "int8" here' in text
    file = tmp_path / "rows.json"
    out = ("-m", arguments[arguments.index("-m") + 1], "--out", tmp_path / "int8")
    evaluate("answers", *out, "--methods", "kivi", "--weights", "int8", "--json", file)
    assert json.loads(file.read_text())["run"]["weights"] == "int8"


def test_the_same_command_resumes_after_an_interrupt(tiny, monkeypatch, tmp_path):
    measure, stop = fake_tasks.AnswerScores.measure, [3]

    def interrupted(self: Any, *arguments: Any) -> Any:
        stop[0] -= 1
        if stop[0] < 0:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(fake_tasks.AnswerScores, "measure", interrupted)
    arguments = (*tiny, "--methods", "full,kivi")
    text = one_line(evaluate("answers", *arguments, code=console.EXIT_INTERRUPTED).stderr)
    assert "3 finished cells are kept" in text and "same command" in text
    evaluate("report", tmp_path / "out")
    stop[0] = 5
    assert "3 of 8 cells were finished earlier" in one_line(evaluate("answers", *arguments).stderr)
    assert stop[0] == 0
    evaluate("answers", *arguments)


def test_another_runs_folder_is_refused(tiny):
    evaluate("answers", *tiny, "--methods", "kivi")
    text = one_line(evaluate("answers", *tiny, "--methods", "kivi", "--count", "5", code=console.EXIT_ERROR).stderr)
    assert "count is 4 there and 5 here" in text
    assert "another run" in one_line(evaluate("divergence", *tiny, code=console.EXIT_ERROR).stderr)


def test_a_warning_of_a_task_is_printed_once_on_one_line(tiny, monkeypatch):
    items = fake_tasks.AnswerScores.items

    def warning(self: Any, model: Any) -> Any:
        warnings.warn("two files are missing", stacklevel=1)
        return items(self, model)

    monkeypatch.setattr(fake_tasks.AnswerScores, "items", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        text = evaluate("answers", *tiny, "--methods", "kivi").stderr
    assert text.count("two files are missing") == 1 and "warning: two files" in text
    assert "UserWarning" not in text and ".py" not in text


def test_table_and_json_are_printed_if_the_report_cannot_be_written(tiny, monkeypatch, tmp_path):
    def full_disk(*arguments: Any) -> Path:
        raise EvaluationError("no space left")

    monkeypatch.setattr("specache.eval.report.write_report", full_disk)
    result = evaluate("answers", *tiny, "--methods", "kivi", "--json", tmp_path / "rows.json", code=console.EXIT_ERROR)
    assert "±" in result.stderr and "no space left" in result.stderr
    assert json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_a_long_run_prints_its_progress_at_most_twenty_times(tiny):
    text = evaluate("answers", *tiny, "--methods", "kivi", "--count", "39").stderr
    assert 10 <= text.count("of 39 cells") <= 20


def test_a_method_that_fails_is_named_after_the_results_of_the_others(tiny, monkeypatch, tmp_path):
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(fake_tasks.MissingMethod, "start", broken)
    file = tmp_path / "rows.json"
    text = one_line(evaluate("answers", *tiny, "--methods", "missing,kivi", "--json", file, code=console.EXIT_ERROR).stderr)
    assert "±" in text and "error: item 'answer/0', method 'missing': RuntimeError: out of order" in text
    assert [(row["method"], row["n"]) for row in json.loads(file.read_text())["rows"]] == [("kivi", 4)]
    assert "missing was skipped: it failed at item 'answer/0'" in one_line(evaluate("report", tmp_path / "out").stderr)


def test_a_skipped_method_is_reported(tiny):
    text = one_line(evaluate("answers", *tiny, "--methods", "missing,kivi").stderr)
    assert "missing is skipped: the library 'nowhere' is not installed" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("answers", "--methods", "nonsense"), "no method 'nonsense'"),
        (("answers", "--methods", "specache:bits=3"), "bits must be one of 1, 2, 4"),
        (("divergence", "--json", "nowhere/rows.json"), "there is no folder nowhere"),
        (("divergence", "--json", "."), "--json .: this is a folder"),
        (("ablate", "--field", "speed", "--values", "1"), "has a setting 'speed'"),
        (("ablate", "--field", "bits", "--values", "1,three"), "must be a whole number, got 'three'"),
        (("ablate", "--field", "bits", "--values", ""), "at least one value"),
        (("ablate", "--field", "bits", "--values", "1", "--methods", "specache:bits=2"), "sets bits, which --field sweeps"),
        (("ablate", "--task", "nonsense", "--field", "bits", "--values", "1"), "no task 'nonsense'"),
    ],
)
def test_usage_errors_are_found_before_a_model_is_loaded(arguments, expected, tmp_path):
    result = evaluate(*arguments, "-m", tmp_path / "no-model", "--out", tmp_path / "out", code=console.EXIT_USAGE)
    assert expected in one_line(result.stderr)
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_a_usage_error():
    assert "No such command 'divine'" in evaluate("divine", code=console.EXIT_USAGE).stderr


def test_ablate_sweeps_a_field_and_plots_it(tiny, tmp_path):
    arguments = ("--field", "k", "--values", "0,4,64,128", "--methods", "specache,specache:bits=1,kivi", *SMALL)
    document = json.loads(evaluate("ablate", *tiny, *arguments, "--json", "-").stdout)
    assert [row["method"] for row in document["rows"]] == [
        *("specache policy=none", "specache top_k=4", "specache top_k=64", "specache long_top_k=128"),
        *(
            "specache bits=1 policy=none",
            "specache bits=1 top_k=4",
            "specache bits=1 top_k=64",
            "specache bits=1 top_k=128",
            "kivi",
        ),
    ]
    means = {row["method"]: row["mean"] for row in document["rows"]}
    assert means["specache long_top_k=128"] < means["specache policy=none"]
    assert document["run"]["settings"]["field"] == "top_k" and document["run"]["settings"]["task"] == "divergence"
    assert (tmp_path / "out" / "ablation.png").is_file()
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    curves, lines = ablate._curves(rows, "top_k")
    assert list(curves) == ["specache", "specache bits=1"]
    assert all(sorted(curve) == [0, 4, 64, 128] for curve in curves.values())
    assert {row["method"] for row in lines} == {"kivi"}
    evaluate("report", tmp_path / "out")


def test_settings_that_follow_the_swept_one_do_not_split_its_curve():
    """Of other bits also residual and pairs are others by default."""
    methods = ablate.sweep("specache,specache:policy=speculative,kivi", "bits", "1,2,4")
    rows = [{"method": method.label, "config": method.method.settings()} for method in methods]
    curves, lines = ablate._curves(rows, "bits")
    assert {label: sorted(curve) for label, curve in curves.items()} == {
        label: [1, 2, 4] for label in ("specache", "specache policy=speculative", "kivi")
    }
    assert not lines


def test_ablate_sweeps_a_score_task(tiny, tmp_path):
    evaluate("ablate", *tiny, "--task", "answers", "--count", "2", "--field", "policy", "--values", "none,on-demand")
    run_file = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run_file["unit"] == "score" and list(run_file["methods"]) == ["full", "specache policy=none", "specache"]
    assert (tmp_path / "out" / "ablation.png").is_file()


def test_report_needs_results(tmp_path):
    assert "holds no results" in one_line(evaluate("report", tmp_path, code=console.EXIT_ERROR).stderr)
