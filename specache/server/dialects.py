"""Which API a request speaks: OpenAI's, or Anthropic's. Its errors come in that API's shape."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

_VERSION_HEADER = b"anthropic-version"
_MESSAGES = "/v1/messages"


class Dialect(Enum):
    """An API."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


def dialect_of(scope: Mapping[str, Any], root_path: str = "") -> Dialect:
    """Return the API that an HTTP request speaks, whether or not its address exists.

    Anthropic's is spoken at `/v1/messages` and below, and wherever a client names its version:
    `/v1/models` is an address of both.
    """
    path = path_without_root(scope["path"], root_path)
    is_theirs = path == _MESSAGES or path.startswith(f"{_MESSAGES}/")
    names_version = any(name.lower() == _VERSION_HEADER for name, _ in scope["headers"])
    return Dialect.ANTHROPIC if is_theirs or names_version else Dialect.OPENAI


def path_without_root(path: str, root_path: str) -> str:
    """Return a path without the prefix of a reverse proxy."""
    if root_path and path == root_path:
        return "/"
    return path.removeprefix(root_path) if root_path and path.startswith(f"{root_path}/") else path
