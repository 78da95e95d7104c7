"""Files that a command writes at its end: looked at before it begins."""

from __future__ import annotations

import os
from pathlib import Path

from specache.errors import ConfigError


def check_output_file(path: str | Path, option: str) -> None:
    """Check that a file can be written, before hours of work that end with it. Nothing is made.

    Args:
        path: of the file, which may be there already; `~` is the home folder.
        option: the option that names it.

    Raises:
        ConfigError: says why not.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigError(f"{option} {file}: this is a folder. Name a file in it.")
    if not file.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {file.parent}.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{option} {path}: it cannot be written there. Name a file in a folder that you may write to.")
