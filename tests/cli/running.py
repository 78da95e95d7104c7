"""Run a command as a user would, without starting a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from specache.cli.main import app


def run(*arguments: str | Path, stdin: str | None = None, code: int = 0) -> Result:
    """Run a command, check its exit code and return the result."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, catch_exceptions=True)
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


def run_json(*arguments: str | Path, stdin: str | None = None, code: int = 0) -> dict[str, Any]:
    """Run a command and return the JSON object on its standard output."""
    return json.loads(run(*arguments, "--json", stdin=stdin, code=code).stdout)


def one_line(text: str) -> str:
    """Remove the line breaks that the terminal's width adds."""
    return " ".join(text.replace("│", " ").split())
