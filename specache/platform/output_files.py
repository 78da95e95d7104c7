"""Files that a command writes at its end: looked at before it begins, and written whole or not."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that holds the old or the new content at any time, also after a crash.

    Links are followed. A device or a pipe is written to, and so is a file that cannot be replaced:
    in a folder of somebody else, or mounted by itself into a container.

    Raises:
        OSError: it cannot be written; what could be replaced is as before.
    """
    if path.exists() and not path.is_file():
        return _write_in_place(path, data)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}")
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY) or not path.exists():
            raise
        _write_in_place(path, data)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _write_in_place(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
