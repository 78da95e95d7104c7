"""`make results`: runs are resumed after a kill, failures are named, and the board is filled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import make_results
from benchmarks.make_results import State
from benchmarks.run_list import RunListError, read_run_list
from specache.eval.origin import checkout_commit
from specache.eval.run_summary import read_summary
from tests.test_results_board import EMPTY_PAGE

ROOT = Path(__file__).parents[1]
FIRST = """
[[runs]]
name = "first"
question = "fidelity"
minutes = 1
command = "eval fidelity -m {tiny} --lengths 200 --new 4 --along text --threads 1 --methods full,specache"
"""
UNKNOWN = """
[[runs]]
name = "unknown-task"
question = "context"
minutes = 1
command = "eval juggling -m {tiny}"
"""
OTHERS = """
[[runs]]
name = "second"
question = "fidelity"
minutes = 2
command = "eval fidelity -m {tiny} --lengths 200,220,240 --new 4 --threads 1 --methods full,specache,kivi"
[[runs]]
name = "of-another-model"
question = "fidelity"
minutes = 3
command = "eval fidelity -m {absent}"
"""
SECONDS = 900  # only how long a test that fails takes to do so
needs_git = pytest.mark.skipif(checkout_commit() is None, reason="not a checkout of git")


class Workplace:
    """A list of runs, a page and folders of its own."""

    def __init__(self, folder: Path, tiny: Path, runs: str = FIRST + OTHERS) -> None:
        self.out, self.results, self.page = folder / "out", folder / "results", folder / "results.md"
        self.page.write_text(EMPTY_PAGE)
        (folder / "runs.toml").write_text(runs)
        self.arguments = ["--out", str(self.out), "--list", str(folder / "runs.toml"), "--results", str(self.results)]
        self.arguments += ["--page", str(self.page), "--model", f"tiny={tiny}"]

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.make_results", *self.arguments, *more]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def run(self, *more: str, code: int = 0) -> str:
        result = invoke(*self.arguments, *more)
        assert result.exit_code == code, result.stderr
        return result.stderr

    def cells(self, name: str) -> list[str]:
        file = self.out / name / "cells.jsonl"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path) -> Workplace:
    return Workplace(tmp_path, tiny_folder)


def test_the_list_is_read_without_pytorch():
    """Every run of the list imports it; what starts them would take seconds more for nothing."""
    code = "import sys, benchmarks.make_results; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@needs_git
@pytest.mark.slow
@pytest.mark.timeout(1800)  # it imports PyTorch three times
def test_a_list_that_was_killed_goes_on_where_it_stopped_and_fills_the_board(tmp_path, tiny_folder, capfd):
    """Past a task that does not exist, which fails at its run."""
    workplace = Workplace(tmp_path, tiny_folder, FIRST + UNKNOWN + OTHERS)
    process = workplace.start()
    deadline = time.monotonic() + SECONDS
    while not workplace.cells("second"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert State.read(workplace.out / "first").finished and not State.read(workplace.out / "second").finished
    assert (workplace.results / "first.json").exists() and not (workplace.results / "second.json").exists()
    finished, of_first = workplace.cells("second"), workplace.cells("first")
    assert 0 < len(finished) < 18

    text = workplace.run(code=1)
    assert "No such command 'juggling'" in capfd.readouterr().err
    assert "error: unknown-task failed with exit code 2" in text and "failed: unknown-task" in text
    assert "skipped: of-another-model needs --model absent=PATH" in text
    assert "3 runs, 1 of them finished earlier; about" in text and "[1 of 3] first: finished at commit" in text
    assert "[3 of 3] second" in text
    assert "elapsed" in text and "to go" in text and "2 runs are on the board" in text
    assert workplace.cells("first") == of_first, "a finished run is not run again"
    assert workplace.cells("second")[: len(finished)] == finished and len(workplace.cells("second")) == 18
    page = workplace.page.read_text()
    assert "results/first.json" in page and "results/second.json" in page and "`kivi`" in page
    assert read_summary(workplace.results / "second.json")["rows"][0]["n"] == 3
    assert "2 of them finished earlier; about 0 s to go" in workplace.run("--show", "--only", "first,second")


def invoke(*arguments: str | Path):
    return CliRunner().invoke(make_results.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--only", "first,third"), "no run is called third. There are: first, second, of-another-model"),
        (("--model", "absent=/nowhere.gguf"), "of a file or folder that exists"),
        (("--model", "absent"), "write NAME=PATH"),
        (("--list", "nowhere.toml"), "cannot read nowhere.toml"),
    ],
)
def test_mistakes_are_found_before_anything_runs(arguments, expected, workplace):
    result = invoke(*workplace.arguments, *arguments)
    assert result.exit_code == 2 and expected in result.stderr and not workplace.out.exists()


def test_only_chooses_runs(workplace):
    text = invoke(*workplace.arguments, "--only", "second", "--show").stderr
    assert "1 runs, 0 of them finished earlier; about 2 min to go" in text and "first" not in text


def test_finished_runs_correct_the_estimates_of_others(workplace):
    runs = read_run_list(Path(workplace.arguments[3])).runs
    models = {"tiny": workplace.arguments[-1].partition("=")[2]}
    State(180.0, True, tuple(runs[0].arguments(models)), "abc1234").write(workplace.out / "first")
    State(100.0, False, tuple(runs[1].arguments(models)), "abc1234").write(workplace.out / "second")
    chosen = make_results.Results(runs, models, workplace.out)
    assert chosen.seconds_left() == pytest.approx(3 * 120 - 100), "the first took three times as long as the list says"


def test_a_run_whose_command_changed_is_not_finished(workplace):
    State(1.0, True, ("eval", "fidelity", "-m", "another"), "abc1234").write(workplace.out / "first")
    assert "0 of them finished earlier" in invoke(*workplace.arguments, "--show").stderr


def test_a_benchmark_becomes_a_summary(tmp_path):
    text = '[[runs]]\nname = "layer"\nquestion = "speed"\nminutes = 1\ncommand = "bench attention --shape llama-3-8b"\n'
    (tmp_path / "runs.toml").write_text(text)
    (run,) = read_run_list(tmp_path / "runs.toml").runs
    document = {
        "benchmark": "attention",
        "settings": {"shape": "llama-3-8b"},
        "model": None,
        "results": [{"impl": "specache", "isa": "amx", "ms": 2.99, "spread": [2.9, 3.1], "phases": None}],
        "machine": {"cpu": "A processor", "threads": 2},
        "kernels": {"active": {"score": "amx"}},
        "versions": {"torch": "2", "transformers": "5", "python": "3"},
    }
    folder = tmp_path / "out" / "layer"
    State(1.0, True, tuple(run.arguments({})), "abc1234").write(folder)
    (folder / make_results.BENCH_FILE).write_text(json.dumps(document))
    summary = make_results.Results([run], {}, tmp_path / "out").summary(run)
    assert summary["model"] == "llama-3-8b" and summary["results"] == [{"impl": "specache", "isa": "amx", "ms": 2.99}]
    assert summary["origins"][0]["commit"] == "abc1234" and summary["command"] == "specache bench attention --shape llama-3-8b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[[runs]]\nname = "a"\n', "run 1: expected the keys command, minutes, name, question"),
        ('[[runs]]\nname = "A b"\nquestion = "q"\nminutes = 1\ncommand = "eval x"\n', "no name of a file"),
        ('[[runs]]\nname = "a"\nquestion = "q"\nminutes = 1\ncommand = "rm x"\n', "begins with eval or bench"),
        ("[[runs]", "cannot read"),
    ],
)
def test_a_malformed_list_is_refused(text, expected, tmp_path):
    (tmp_path / "runs.toml").write_text(text)
    with pytest.raises(RunListError, match=expected):
        read_run_list(tmp_path / "runs.toml")
