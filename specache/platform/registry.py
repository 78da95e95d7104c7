"""Classes by name, for everything that is one file and one line in a table: nothing is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from specache.errors import ConfigError


def named_class(table: Mapping[str, str], name: str, kind: str, advice: str = "") -> Any:
    """The class that a table of `"package.module:Class"` has under `name`.

    Args:
        kind: what the table holds, for the message (`task`).
        advice: a sentence at the end of the message.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in table:
        raise ConfigError(f"There is no {kind} {name!r}. Known: {', '.join(table)}.{advice and f' {advice}'}")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
