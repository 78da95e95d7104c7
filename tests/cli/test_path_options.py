"""An empty path, the value of a variable that is not set, does not mean the current folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from specache.cli import console
from tests.cli.running import one_line, run

EMPTY = [
    ("serve", "-m", "demo", "--prefix-cache", ""),
    ("serve", "-m", "demo", "--prefix-cache="),
    ("serve", "-m", "demo", "--api-key-file", " "),
    ("generate", "-m", "demo", "--prompt-file", ""),
    ("generate", "-m", "demo", "--prompt-file", "a.txt", "--prompt-file", ""),
    ("chat", "-m", "demo", "--session", "one", "--session-dir", ""),
    ("plan", "-m", "demo", "--gpu-spec", ""),
    ("session", "list", "--session-dir", ""),
    ("session", "export", "one", ""),
    ("session", "import", ""),
    ("eval", "fidelity", "-m", "demo", "--out", ""),
    ("eval", "ablate", "-m", "demo", "--field", "bits", "--values", "1", "--out", ""),
    ("eval", "report", ""),
    ("eval", "report", "one", ""),
    ("eval", "report", "one", "--summary", ""),
    ("bench", "tiers", "--dir", ""),
    ("bench", "serve", "--trace", ""),
    ("bench", "paper", "--plot", ""),
]


@pytest.mark.parametrize("arguments", EMPTY, ids=" ".join)
def test_an_empty_path_is_refused_before_anything_is_done(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=console.EXIT_USAGE)
    assert "the path is empty" in one_line(result.stderr)
    assert not list(tmp_path.iterdir())


def test_the_current_folder_is_one_when_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no sessions" in run("session", "list", "--session-dir", ".").stderr


@pytest.mark.parametrize("arguments", [("doctor",), ("session", "list"), ("eval", "list"), ("generate", "-m", "demo", "-p", "x")])
def test_a_current_folder_that_was_removed_is_named(arguments, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = run(*arguments, code=console.EXIT_ERROR)
    assert "the current folder is no longer there" in one_line(result.stderr)


@pytest.mark.parametrize("option", ["--text", "--lengths"])
def test_a_list_of_an_evaluation_that_is_empty_is_not_its_default(option, tmp_path: Path):
    """`--text "$FILES"` measured Python's documentation if FILES was not set."""
    result = run("eval", "fidelity", "-m", "demo", "--out", tmp_path / "out", option, "", code=console.EXIT_USAGE)
    assert f"{option} is empty" in one_line(result.stderr)
    assert not (tmp_path / "out").exists()
