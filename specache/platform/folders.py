"""Folders where specache keeps a user's data."""

from __future__ import annotations

import os
from pathlib import Path

from specache.errors import ConfigError

_NAME = "specache"


def cache_folder() -> Path:
    """Return the folder of converted models and of sessions.

    It is `$SPECACHE_CACHE`; else `specache` in `$XDG_CACHE_HOME`, if that is an absolute path
    (relative ones are invalid by the XDG Base Directory Specification); else `~/.cache/specache`.

    Raises:
        ConfigError: none of them is set, and there is no home folder.
    """
    if named := os.environ.get("SPECACHE_CACHE"):
        return _expanded(Path(named))
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base) / _NAME if os.path.isabs(base) else _home_cache()


def earlier_cache_folder() -> Path | None:
    """Return `~/.cache/specache` if `$XDG_CACHE_HOME` moved the cache folder elsewhere: its content
    is still used.

    Return None if it is the cache folder, if `$SPECACHE_CACHE` is set, or if it does not exist.
    """
    if os.environ.get("SPECACHE_CACHE"):
        return None
    try:
        earlier = _home_cache()
        return earlier if earlier != cache_folder() and earlier.is_dir() else None
    except (ConfigError, OSError):
        return None


def _home_cache() -> Path:
    return _expanded(Path("~/.cache")) / _NAME


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"There is no home folder for {path}: {error} Set SPECACHE_CACHE to a folder for converted models and sessions."
        ) from None
