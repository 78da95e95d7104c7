"""Where specache keeps what it makes for a user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Folder of converted models and of sessions: `$SPECACHE_CACHE`, by default `~/.cache/specache`."""
    return Path(os.environ.get("SPECACHE_CACHE") or "~/.cache/specache").expanduser()
