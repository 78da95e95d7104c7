"""The command itself: version, help and imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import specache
from tests.cli.running import one_line, run
from tests.sessions.sequences import llama, opened, prefill, prompt, settings


def test_version_prints_the_version():
    assert run("--version").stdout == f"specache {specache.__version__}\n"


def test_help_names_every_command():
    text = run("--help").stdout
    assert all(command in text for command in ("generate", "chat", "demo", "doctor"))


@pytest.mark.parametrize("command", ["generate", "chat", "demo", "doctor", "serve"])
def test_every_command_explains_itself(command):
    assert "Usage" in run(command, "--help").stdout


def test_generate_groups_its_options_and_gives_examples():
    text = one_line(run("generate", "--help").stdout)
    assert all(title in text for title in ("Model", "Key-value cache", "Generation", "Examples"))


def test_an_unknown_command_is_a_usage_error():
    assert "No such command" in run("divine", code=2).stderr


def in_a_new_process(program: str, *arguments: str | Path) -> str:
    """Run a program and return its output, which ends with the slow libraries that it imported."""
    program += "\nimport sys; print({'torch', 'transformers', 'safetensors'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_needs_no_model_does_not_wait_for_pytorch(tmp_path):
    with opened(tmp_path, llama(), settings()) as session:
        prefill(session, llama(), prompt(100))
        session.save()
    program = """
import sys
from specache.cli.main import app
for line in sys.argv[2].split(";"):
    try:
        app([*line.split(), *([] if "-" in line else ["--session-dir", sys.argv[1]])])
    except SystemExit as end:
        assert not end.code, line
"""
    explained = "--help;--version;generate --help;chat --help;demo --help;doctor --help;plan --help;session --help;serve --help"
    looked_after = "session list;session show one;session fork one two;session rm one;session list"
    printed = in_a_new_process(program, tmp_path, f"{explained};{looked_after}")
    assert "Key-value cache" in printed and "two" in printed
    assert printed.endswith("\nnone\n")


def test_the_library_imports_pytorch_when_it_is_needed():
    program = """
import specache
assert set(specache.__all__) <= set(dir(specache))
specache.SpeCacheConfig(bits=1), specache.SessionError
assert not hasattr(specache, "nothing")
"""
    assert in_a_new_process(program) == "none\n"
    program += """
from specache import *
for name in specache.__all__:
    assert globals()[name] is getattr(specache, name), name
from specache.engine.generate import generate as own
from specache.sessions.session import Session as own_session
assert own is generate and own_session is Session is specache.sessions.Session
assert set(specache.sessions.__all__) <= set(dir(specache.sessions))
"""
    assert "torch" in in_a_new_process(program)


def test_the_package_is_run_as_the_command_is():
    for flags in ([], ["-O"]):
        command = [sys.executable, *flags, "-m", "specache"]
        assert subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.startswith("specache ")
    failed = subprocess.run([*command, "session", "show", "a/b"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
