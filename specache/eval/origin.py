"""Describe where and when cells are measured: commit, machine, versions, date."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from specache.platform import machine

_CHECKOUT = Path(__file__).resolve().parents[2]
_CODE = ("specache", "csrc")  # changes elsewhere (tests, pages) measure the same
_GIT_SECONDS = 10


def describe_origin() -> dict[str, Any]:
    """Return the origin of cells that this process measures, JSON-ready."""
    import torch  # takes seconds, and a commit needs none of it

    from specache.kernels import dispatch

    return {
        "commit": checkout_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.processor_name(),
        "threads": torch.get_num_threads(),
        "kernels": next(iter(dispatch.active().values())),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
    }


def checkout_commit(folder: Path = _CHECKOUT) -> str | None:
    """Return the commit of the checkout that specache runs from, as `1237ca6`.

    `+` is appended if its code has changes that are not committed. None if `folder` is no checkout
    of git, or git is not installed.
    """
    if not (folder / ".git").exists():  # site-packages may lie inside somebody else's checkout
        return None
    commit = _git(folder, "rev-parse", "--short=7", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", *_CODE)
    if commit is None or changes is None:
        return None
    return commit + ("+" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
