"""A full disk, a closed pipe, an unforeseen error: one line at most, an exit code that says so, and
no traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specache import sessions
from specache.cli import console, main
from specache.cli.program import run as run_program

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")

PROGRAM = Path(sys.executable).with_name("specache")
QUICK = {
    "--help": (),
    "--version": (),
    "generate": ("--help",),
    "session": ("list", "--json"),
    "eval": ("list",),
}


def specache(*arguments: str | Path, cache: Path, redirected: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a shell that redirects its streams."""
    environment = {**os.environ, "SPECACHE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("SPECACHE_DEBUG", None)
    command = ["sh", "-c", f'exec "$0" "$@" {redirected}', PROGRAM, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", env=environment, check=False)


@pytest.mark.parametrize("command", QUICK)
def test_a_full_standard_output_is_an_error_of_every_command(tmp_path, command):
    done = specache(command, *QUICK[command], cache=tmp_path, redirected=">/dev/full")
    assert (done.returncode, done.stderr) == (1, "error: cannot write to standard output: No space left on device.\n")


def test_a_closed_standard_output_is_an_error(tmp_path):
    done = specache("--version", cache=tmp_path, redirected=">&-")
    assert (done.returncode, done.stderr) == (1, "error: cannot write to standard output: it is closed.\n")


def test_a_closed_pipe_ends_the_command_quietly(tmp_path):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "SPECACHE_CACHE": str(tmp_path)}
    done = subprocess.run([PROGRAM, "generate", "--help"], stdout=write, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (console.EXIT_CLOSED_PIPE, b"")


def test_lost_messages_change_the_exit_code_but_not_the_result(tmp_path):
    arguments = ("session", "list")  # says on standard error that there are none
    assert specache(*arguments, cache=tmp_path, redirected="2>/dev/full").returncode == 1
    assert specache(*arguments, cache=tmp_path, redirected="2>&-").returncode == 0
    assert specache("session", "list", "--json", cache=tmp_path, redirected="2>/dev/full").stdout == '{"sessions": []}\n'


def test_an_answer_that_cannot_be_written_stays_in_its_session(tiny_folder, tmp_path):
    generate = ("generate", "-m", tiny_folder, "-n", "5", "--dtype", "float32", "--prompt", "hello", "--session", "kept")
    done = specache(*generate, cache=tmp_path, redirected=">/dev/full")
    assert done.returncode == 1 and done.stderr.endswith("error: cannot write to standard output: No space left on device.\n")
    assert "Traceback" not in done.stderr
    assert sessions.show("kept", tmp_path / "sessions").messages == 2


def code_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def failing() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_program(failing)
    return end.value.code, capsys.readouterr().err  # type: ignore[return-value]


def test_an_unforeseen_error_is_a_line_that_says_how_to_see_more(monkeypatch, capsys):
    monkeypatch.delenv("SPECACHE_DEBUG", raising=False)
    hint = " (Set SPECACHE_DEBUG=1 for the traceback.)\n"
    assert code_of(ZeroDivisionError("division\nby zero"), capsys) == (1, f"error: ZeroDivisionError: division by zero.{hint}")
    assert code_of(OSError(28, "No space left on device", "report.html"), capsys) == (
        1,
        f"error: report.html: No space left on device.{hint}",
    )
    assert code_of(KeyboardInterrupt(), capsys) == (130, "Interrupted.\n")
    monkeypatch.setenv("SPECACHE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)


def test_the_streams_are_the_callers_again_afterwards(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        main.app(["--version"])
    assert (sys.stdout, sys.stderr) == before
