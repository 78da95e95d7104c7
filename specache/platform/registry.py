"""Look up classes by name in a table, and import them on demand."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from specache.errors import ConfigError


def named_class(table: Mapping[str, str], name: str, kind: str, advice: str = "") -> Any:
    """Return the class that a table of `"package.module:Class"` has under `name`.

    Args:
        kind: kind of entry, for the message (`task`).
        advice: a sentence at the end of the message.

    Raises:
        ConfigError: the table has no such name.
    """
    if name not in table:
        raise ConfigError(f"There is no {kind} {name!r}. Known: {', '.join(table)}.{advice and f' {advice}'}")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
