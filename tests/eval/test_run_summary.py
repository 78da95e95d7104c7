"""A summary has what the board shows: rows, commits, and a command that measures them again."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from specache.cli.console import EXIT_ERROR, EXIT_USAGE
from specache.errors import EvaluationError
from specache.eval import catalogue
from specache.eval.methods_option import parse_methods
from specache.eval.origin import checkout_commit
from specache.eval.results import read_results
from specache.eval.run_summary import command_of, read_summary, summarise, summary_text
from specache.eval.setting_fields import from_json
from specache.eval.tasks.ablate import Ablate
from specache.eval.tasks.fidelity import Fidelity
from specache.eval.tasks.needle import Needle
from specache.eval.tasks.ruler import Ruler
from tests.cli.running import one_line, run
from tests.eval.result_folders import KL, ORIGIN, SCORE, write_run

DIVERGENCES = {
    "full": {"text/0": [0.0] * 32, "text/1": [0.0] * 32},
    "specache bits=1": {"text/0": [0.01, 0.03] * 16, "text/1": [0.02] * 32},
}


def test_a_summary_has_rows_memory_commits_and_no_values(tmp_path):
    document = summarise(write_run(tmp_path / "out", DIVERGENCES))
    full, ours = document["rows"]
    assert ours["mean"] == 0.02 and ours["ci95"][0] <= 0.02 <= ours["ci95"][1] and ours["p99"] > 0.02
    assert (ours["fast_ratio"], ours["hot_ratio"], full["fast_ratio"]) == (0.17, 0.08, 1.0)
    assert ours["n"] == 2 and ours["tokens"] == 64 and ours["prompt_tokens"] == [4000, 5000] and ours["commit"] == "abc1234"
    assert document["origins"] == [ORIGIN] and document["methods"]["specache bits=1"]["settings"] == {"bits": 2}
    assert [(row["prompt_tokens"], row["mean"]) for row in document["lengths"][2:]] == [(4000, 0.02), (5000, 0.02)]
    assert "values" not in json.dumps(document)


def test_scores_are_also_pooled_over_their_groups(tmp_path):
    full = {f"{group}/{number}": [1.0] for group in ("one", "two") for number in range(10)}
    ours = {**full, "two/3": [0.0]}
    document = summarise(write_run(tmp_path, {"full": full, "specache": ours}, unit=SCORE))
    assert len(document["rows"]) == 4 and len(document["overall"]) == 2 and document["lengths"] == []
    pooled = document["overall"][1]
    assert pooled["kept"] == 0.95 and pooled["kept_n"] == 20 and pooled["mean"] == 0.95 and pooled["delta"] == -0.05


def test_a_run_resumed_at_another_commit_names_the_commit_of_every_row(tmp_path):
    write_run(tmp_path, {"full": {"text/0": [0.0] * 8}})
    later = {**ORIGIN, "commit": "def5678"}
    write_run(tmp_path, {"specache": {"text/0": [0.1] * 8}}, origin=later)
    assert [row["commit"] for row in summarise(tmp_path)["rows"]] == ["abc1234", "def5678"]
    write_run(tmp_path, {"kivi": {"text/0": [0.1] * 8}}, origin={**later, "date": "2026-02-03"})
    run_there, cells = read_results(tmp_path)
    assert run_there.origins == [ORIGIN, later], "the same commit and machine on another day is no other origin"
    assert [cell["origin"] for cell in cells] == [0, 1, 1]


def test_cells_of_earlier_versions_need_a_commit(tmp_path):
    folder = write_run(tmp_path / "out", DIVERGENCES, origin=None, tokens=None)
    document = json.loads((folder / "run.json").read_text())
    del document["origins"]
    (folder / "run.json").write_text(json.dumps(document))
    with pytest.raises(EvaluationError, match=r"4 of the 4 cells .* --commit"):
        summarise(folder)
    assert {row["commit"] for row in summarise(folder, commit="1afa351")["rows"]} == {"1afa351"}


def test_a_folder_without_cells_has_no_summary(tmp_path):
    with pytest.raises(EvaluationError, match="no finished cells"):
        summarise(write_run(tmp_path, {"full": {}}))


def test_the_text_is_read_back_and_has_a_line_per_row(tmp_path):
    document = summarise(write_run(tmp_path / "out", DIVERGENCES))
    (tmp_path / "file.json").write_text(summary_text(document))
    assert read_summary(tmp_path / "file.json") == document
    lines = (tmp_path / "file.json").read_text().splitlines()
    assert sum('"task": "fidelity/text", "method": "full"' in line for line in lines) == 1 + 2  # one row, two documents
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(EvaluationError, match="no summary of format 1"):
        read_summary(tmp_path / "file.json")


@pytest.mark.parametrize(
    "task",
    [
        Fidelity(lengths=(2000, 300), new=64, along=("text",), chat=False, question="What is 'this'?"),
        Needle(lengths=(8000,), depths=(0.25, 1.0), together=True, documents=3),
        Ruler(tasks=("niah_single_1",), samples=3, qa1=Path("squad.json"), seed=4),
    ],
    ids=lambda task: task.name,
)
def test_the_command_measures_the_same_task_and_methods(task, tmp_path):
    identity = {"model": "/home/someone/model.gguf", "seed": 4, "dtype": "bfloat16", "weights": "int8"}
    folder = write_run(
        tmp_path / "out", {"full": {"a/0": [0.0]}, "specache bits=1 top_k=128": {"a/0": [0.5]}}, task=task, **identity
    )
    described = read_results(folder)[0]
    words = shlex.split(command_of(described, "results"))
    assert words[:5] == ["specache", "eval", task.name, "-m", "model.gguf"] and "someone" not in " ".join(words)
    assert parsed_task(words) == replace(task, seed=4)
    options = dict(pairwise(words))
    assert [options[name] for name in ("--dtype", "--weights", "--out")] == ["bfloat16", "int8", "results"]
    assert [method.label for method in parse_methods(options["--methods"])] == list(described.methods)


def test_the_command_of_an_ablation_names_what_it_swept(tmp_path):
    task = Ablate(Fidelity(new=64), "top_k")
    folder = write_run(tmp_path / "out", {"specache top_k=16": {"a/0": [0.0]}, "specache": {"a/0": [0.5]}}, task=task)
    command = command_of(read_results(folder)[0])
    assert command == "specache eval fidelity -m demo --new 64 --methods specache:top_k=16,specache --out DIR"


def test_report_writes_a_summary_and_nothing_else(tmp_path):
    folder = write_run(tmp_path / "out", DIVERGENCES)
    before = sorted(path.name for path in folder.iterdir())
    run("eval", "report", folder, "--summary", tmp_path / "file.json")
    assert read_summary(tmp_path / "file.json")["unit"] == KL and sorted(path.name for path in folder.iterdir()) == before
    text = one_line(run("eval", "report", folder, "--summary", tmp_path / "nowhere" / "file.json", code=EXIT_USAGE).stderr)
    assert "there is no folder" in text
    assert "holds no results" in one_line(run("eval", "report", tmp_path, "--summary", tmp_path / "f.json", code=EXIT_ERROR).stderr)


def test_a_commit_is_that_of_this_checkout_or_none(tmp_path):
    assert checkout_commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert checkout_commit(tmp_path) is None, "a broken checkout has no commit, and no error"


def parsed_task(words: list[str]):
    """Return the task that the command line builds from these words."""
    from specache.cli.evaluation_command import task_command

    made = []
    cls = catalogue.task_class(words[2])
    command = task_command(words[2], cls, lambda shared, task, methods: made.append(task))
    command.main(words[3:], standalone_mode=False)
    assert made[0] == from_json(cls, made[0].settings())
    return made[0]
