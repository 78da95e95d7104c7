"""Read the paths of options and arguments, of every command."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.models import ParameterInfo


def read_path(text: str) -> Path:
    """Return the path that a user wrote, in the user's folder if it begins with `~`.

    Shells leave `~` as it is in `--option=~/path`.

    Raises:
        typer.BadParameter: it is empty, as the value of a variable that is not set. Python takes
            that for the current folder.
    """
    if not text.strip():
        raise typer.BadParameter("the path is empty. Name one ('.': the current folder), or leave the option out.")
    path = Path(text)
    return path.expanduser() if path.parts[:1] == ("~",) else path


def parse_paths(command: Callable[..., Any]) -> None:
    """Have typer parse the paths among a command's parameters with `read_path`."""
    hints = typing.get_type_hints(command, include_extras=True)
    for hint in hints.values():
        kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        if Path not in _parts(kind):
            continue
        for note in notes:
            if isinstance(note, ParameterInfo):
                note.parser = read_path
    signature = inspect.signature(command)
    parameters = [one.replace(annotation=hints[name]) for name, one in signature.parameters.items()]
    command.__annotations__ = hints
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]


def _parts(kind: Any) -> set[Any]:
    """Return a type and those that it is made of: of `list[Path] | None`, `Path` too."""
    return {kind}.union(*map(_parts, typing.get_args(kind)))
