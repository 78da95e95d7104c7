"""Rewrite messages about settings for the command line: `--top-k` instead of `top_k`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from specache.config import SpeCacheConfig
from specache.eval.setting_fields import flag

_SETTINGS = frozenset(field.name for field in dataclasses.fields(SpeCacheConfig))


def in_flags(message: str, parameters: Iterable[str]) -> str:
    """Return an error's message with flags in place of settings that are options here.

    A setting is replaced if it begins the message (`bits must be ...`) or is assigned
    (`policy='none'` becomes `--policy none`). Names that are not English words (`fast_memory`) are
    replaced everywhere.

    Args:
        parameters: names of the command's parameters. Other settings keep their names, since the
            user wrote them in another way, for example in `--methods`.
    """
    names = "|".join(_SETTINGS.intersection(parameters))
    if not names:
        return message
    message = re.sub(rf"\b({names})=(?:'([^']*)'|([\w.-]*\w))", lambda m: f"--{flag(m[1])} {m[2] or m[3]}", message)
    named = "|".join(name for name in names.split("|") if "_" in name) or "(?!)"
    return re.sub(rf"^({names})\b|(?<![\w./-])({named})(?![\w/-]|\.\w)", lambda m: f"--{flag(m[0])}", message)
