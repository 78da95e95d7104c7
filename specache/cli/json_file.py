"""The option `--json FILE` of long-running commands that print tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from specache.cli.console import write
from specache.errors import SpeCacheError
from specache.platform.output_files import check_output_file, write_whole

STANDARD_OUTPUT = "-"

JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", rich_help_panel="Run", help="Write the results as JSON ('-': standard output)."),
]


def check_json(target: str | None) -> None:
    """Check, before hours of measuring, that the file can be written.

    Raises:
        ConfigError: it cannot.
    """
    if target is not None and target != STANDARD_OUTPUT:
        check_output_file(target, "--json")


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON object in one line."""
    write(json.dumps(document, ensure_ascii=False) + "\n")


def write_json(target: str, document: dict[str, Any]) -> None:
    """Write one JSON object to a file or to standard output.

    Raises:
        SpeCacheError: the file cannot be written. What it held before is kept.
    """
    text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    if target == STANDARD_OUTPUT:
        write(text)
        return
    try:
        write_whole(Path(target).expanduser(), text.encode())
    except OSError as error:
        raise SpeCacheError(f"cannot write {target}: {error.strerror or error}. Choose another --json.") from error
