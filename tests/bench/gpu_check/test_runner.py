"""`gpu-check`: no part can stop the others, what was found is kept, and a second run resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specache.bench.gpu_check import part_runner as runner
from specache.bench.gpu_check import process
from specache.bench.gpu_check import result_page as report
from specache.bench.gpu_check.__main__ import main
from specache.bench.gpu_check.part_runner import Run, run_parts
from specache.bench.gpu_check.parts import PARTS, Part, chosen_parts
from specache.errors import ConfigError

LIMIT_S = 300.0  # of a part that ends by itself, on a very busy machine


def part(name: str, number: int = 1, seconds: float = LIMIT_S) -> Part:
    return Part(number, name, f"tests.bench.gpu_check.broken_parts:{name}", seconds)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    """A folder for the processes' files, apart from those of other runs."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setattr(runner, "work_folder", lambda tree: folder)
    return folder


def run(folder: Path, *parts: Part, **settings: Any) -> report.Results:
    return run_parts(parts, Run(folder / "out", "cpu", **settings), lambda text: None)


def only(results: report.Results, number: int = 1) -> dict[str, Any]:
    return results.parts[number]


def runs(process: int) -> bool:
    """Return whether a process exists and is not merely waited for."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state not in "ZX"


def ends(process: int) -> bool:
    """Return whether a process ends; one that was killed takes a moment to."""
    limit = time.monotonic() + LIMIT_S
    while runs(process) and time.monotonic() < limit:
        time.sleep(0.1)
    return not runs(process)


def time_is_up_with(monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
    """Let the time of processes be up as soon as they have written these files, and not before."""

    def monotonic() -> float:
        written = all(file.exists() and file.read_text() for file in files)
        return time.monotonic() + (10**6 if written else 0)

    def sleep(seconds: float) -> None:
        time.sleep(5 * seconds)  # a busy machine takes longer to write stacks

    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=monotonic, sleep=sleep))


def failed(record: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["message"] for check in record["checks"] if check["status"] == "failed"}


def test_every_check_runs_whatever_those_before_it_did(tmp_path):
    record = only(run(tmp_path, part("fails")))
    assert record["status"] == "failed"
    assert [check["status"] for check in record["checks"]] == ["failed", "failed", "passed", "skipped"]
    messages = failed(record)
    assert messages["wrong numbers"] == "2 is not 3"
    assert "KeyError" in messages["an error"] and "broken_parts.py" in messages["an error"]
    assert record["checks"][3]["message"] == "no such GPU"


@pytest.mark.parametrize(
    ("name", "check", "said"),
    [
        ("is_killed", "takes all memory", "SIGKILL"),
        ("crashes", "reads nowhere", "SIGSEGV"),
        ("leaves", "calls exit", "SystemExit"),
        ("leaves_hard", "calls _exit", "before the part was complete"),
        ("raises", "the part's process", "exit code 1"),
    ],
)
def test_a_part_that_ends_early_names_the_check_and_the_next_part_runs(tmp_path, name, check, said):
    results = run(tmp_path, part(name), part("passes", 2))
    assert said in failed(only(results))[check]
    assert only(results)["status"] == "failed" and results.passed(2)
    assert results.status == "failed"


def test_a_part_that_hangs_is_killed_with_its_children_and_says_where(tmp_path, work, monkeypatch):
    time_is_up_with(monkeypatch, work / "waits", work / "grandchild")
    results = run(tmp_path, part("hangs_with_a_child"), part("passes", 2))
    assert "its time was up after" in failed(only(results))["waits for ever"]
    assert only(results)["checks"][0]["status"] == "passed" and results.passed(2)
    assert ends(int((work / "grandchild").read_text()))
    assert "broken_parts.py" in (tmp_path / "out" / report.LOG_NAME).read_text()  # the stacks of its threads


def test_a_lost_gpu_ends_the_part_and_only_this_part(tmp_path):
    results = run(tmp_path, part("loses_the_gpu"), part("passes", 2))
    record = only(results)
    assert [check["name"] for check in record["checks"]] == ["reads past the end"]
    assert "illegal memory access" in failed(record)["reads past the end"]
    assert "could no longer be used" in record["notes"][0] and results.passed(2)


def test_memory_that_runs_out_fails_one_check(tmp_path):
    record = only(run(tmp_path, part("runs_out_of_memory")))
    assert [check["status"] for check in record["checks"]] == ["failed", "passed"]
    assert "Tried to allocate 2.00 GiB" in failed(record)["too large"]


def test_a_check_for_which_there_is_no_time_is_skipped(tmp_path):
    record = only(run(tmp_path, part("has_no_time")))
    assert record["checks"][0]["status"] == "skipped" and "it takes about" in record["checks"][0]["message"]


def test_output_is_in_the_log_and_warnings_are_with_their_check(tmp_path):
    record = only(run(tmp_path, part("says")))
    log = (tmp_path / "out" / report.LOG_NAME).read_text()
    assert "said on stdout" in log and "said on stderr" in log and "part 1: says" in log
    assert record["checks"][0]["warned"] == ["this was slower"]


def test_a_second_run_does_what_is_missing_or_failed(tmp_path, work):
    run(tmp_path, part("passes"), part("fails", 2))
    again = run(tmp_path, part("passes"), part("fails", 2), part("passes", 3))
    assert (work / "count").read_text() == "11"  # parts 1 and 3, once each
    assert again.passed(1) and again.passed(3) and not again.passed(2)
    run(tmp_path, part("passes"), again=True)
    assert (work / "count").read_text() == "111"


def test_results_of_other_sources_are_not_taken_over(tmp_path, work, monkeypatch):
    run(tmp_path, part("passes"))
    monkeypatch.setattr(runner, "tree_hash", lambda: "another")
    results = run(tmp_path, part("passes", 2))
    assert results.dropped and list(results.parts) == [2]
    run(tmp_path, part("passes"))
    assert (work / "count").read_text() == "111"


def test_facts_reach_later_parts(tmp_path):
    results = run(tmp_path, part("passes"), part("passes", 2))
    assert results.facts["seen"] == 2


def test_a_part_may_use_the_time_that_earlier_ones_left(tmp_path):
    said: list[str] = []
    run_parts([part("passes", 1, 100.0), part("passes", 2, 1.0)], Run(tmp_path / "out", "cpu"), said.append)
    limits = [float(text.split()[-2]) for text in said if "at most" in text]
    assert limits[0] == 100 and 1 < limits[1] <= 101


def test_results_are_written_before_the_next_part_begins(tmp_path, work):
    """A parent that is killed leaves what was found, also in the part that runs; that ends too."""
    code = (
        "from pathlib import Path\n"
        "from specache.bench.gpu_check import part_runner as runner\n"
        "from tests.bench.gpu_check.test_runner import part\n"
        f"runner.work_folder = lambda tree: Path({str(work)!r})\n"
        f"runner.run_parts([part('passes'), part('hangs', 2)], runner.Run(Path({str(tmp_path / 'out')!r}), 'cpu'))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    file, parts = tmp_path / "out" / report.JSON_NAME, {}
    try:
        limit = time.monotonic() + 2 * LIMIT_S
        while time.monotonic() < limit and len(parts.get("2", {}).get("checks", [])) < 2:
            time.sleep(0.2)
            parts = json.loads(file.read_text())["parts"] if file.exists() else {}
    finally:
        process.kill()
        process.wait()
    assert parts["1"]["status"] == "passed"
    assert [check["name"] for check in parts["2"]["checks"]] == ["before", "waits for ever"]
    assert parts["2"]["status"] == "running"
    assert ends(int((work / "pid").read_text()))


def test_an_interrupted_run_kills_its_part_and_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specache.bench.gpu_check.__main__.run_parts", interrupted)
    assert main(["--out", str(tmp_path), "--device", "cpu"]) == 130
    assert "The same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "numbers"), [(None, [1, 2, 3, 4, 5, 6]), ("1-4", [1, 2, 3, 4]), ("6,2", [2, 6]), ("3", [3])])
def test_parts_are_chosen_by_number(text, numbers):
    assert [one.number for one in chosen_parts(text)] == numbers


@pytest.mark.parametrize("text", ["", "0", "7", "1-9", "a", "2-", "1,,2", "-3"])
def test_other_parts_are_refused(text):
    with pytest.raises(ConfigError, match="--parts takes numbers"):
        chosen_parts(text)


def test_a_wrong_option_is_said_in_one_line(tmp_path, capsys):
    assert main(["--parts", "9", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --parts takes numbers from 1 to 6")


def test_the_times_are_those_that_are_promised():
    assert sum(one.seconds for one in PARTS[:4]) <= 240 and sum(one.seconds for one in PARTS) <= 360


def test_the_parent_imports_no_pytorch():
    """It would take seconds at the start, and hold GPU memory meanwhile."""
    code = "import sys, specache.bench.gpu_check.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_two_runs_of_the_same_sources_do_not_disturb_each_other(tmp_path, work):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, tmp_path / name, part("passes"), part("fails", 2), part("passes", 3)) for name in "ab"]
        for one in runs:
            results = one.result()
            assert failed(only(results)) == failed(only(results, 3)) == {}
            assert results.passed(1) and results.passed(3) and len(results.parts[2]["checks"]) == 4
    assert (work / "count").read_text() == "1111"
    assert not list(work.glob("run-*"))  # what a run needed for itself is gone


def test_a_machine_without_a_gpu_is_told_so_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_machine", lambda device: runner.UNKNOWN)
    monkeypatch.setattr(runner, "DRIVER", str(tmp_path / "none"))
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "no NVIDIA GPU here. --device cpu" in capsys.readouterr().err


def test_every_part_is_there():
    assert all(callable(one.load()) for one in PARTS)
