"""Messages about settings, in the words of the command line: a user who typed `--top-k` reads of `--top-k`, not of `top_k`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from specache.config import SpeCacheConfig
from specache.eval.setting_fields import flag

_SETTINGS = frozenset(field.name for field in dataclasses.fields(SpeCacheConfig))


def in_flags(message: str, parameters: Iterable[str]) -> str:
    """An error's message with flags for the settings of `SpeCacheConfig` that a command has as options of its own.

    A setting is named where it begins the message (`bits must be ...`) or is assigned (`policy='none'` becomes `--policy none`);
    names that are no English words (`fast_memory`) are settings everywhere.

    Args:
        parameters: names of the command's parameters. Settings that are not among them keep their names: the user wrote them
            otherwise, for example in `--methods`.
    """
    names = "|".join(_SETTINGS.intersection(parameters))
    if not names:
        return message
    message = re.sub(rf"\b({names})=(?:'([^']*)'|([\w.-]*\w))", lambda m: f"--{flag(m[1])} {m[2] or m[3]}", message)
    named = "|".join(name for name in names.split("|") if "_" in name) or "(?!)"
    return re.sub(rf"^({names})\b|(?<![\w./-])({named})(?![\w/-]|\.\w)", lambda m: f"--{flag(m[0])}", message)
