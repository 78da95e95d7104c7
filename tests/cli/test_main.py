"""The command itself."""

from __future__ import annotations

import pytest

import specache
from tests.cli.running import one_line, run


def test_version():
    assert run("--version").stdout == f"specache {specache.__version__}\n"


def test_help_names_every_command():
    text = run("--help").stdout
    assert all(command in text for command in ("generate", "chat", "demo", "doctor"))


@pytest.mark.parametrize("command", ["generate", "chat", "demo", "doctor"])
def test_every_command_explains_itself(command):
    assert "Usage" in run(command, "--help").stdout


def test_generate_groups_its_options_and_gives_examples():
    text = one_line(run("generate", "--help").stdout)
    assert all(title in text for title in ("Model", "Key-value cache", "Generation", "Examples"))


def test_an_unknown_command_is_a_usage_error():
    assert "No such command" in run("divine", code=2).stderr
