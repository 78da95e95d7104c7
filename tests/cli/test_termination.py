"""A command that is told to end removes what it made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, tempfile, time
from specache.cli.console import reports_errors

@reports_errors
def command():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        print("ready", flush=True)
        time.sleep(float(sys.argv[2]))
    print("done", flush=True)

command()
"""


def begun(folder: Path, seconds: float, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    assert process.stdout is not None and process.stdout.readline() == "ready\n" and len(os.listdir(folder)) == 1
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_removes_its_temporary_folder(tmp_path, number):
    with begun(tmp_path, 60) as process:
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert not os.listdir(tmp_path)


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    with begun(tmp_path, 0.5, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 0 and process.stdout is not None and process.stdout.read() == "done\n"


def test_signals_are_as_before_after_a_command(capsys):
    from specache.cli.console import reports_errors

    before = signal.getsignal(signal.SIGTERM)
    reports_errors(lambda: None)()
    assert signal.getsignal(signal.SIGTERM) is before
