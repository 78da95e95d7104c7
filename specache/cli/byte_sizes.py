"""Parse sizes in bytes."""

from __future__ import annotations

import math
import re

from specache.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)", re.IGNORECASE)


def number_and_unit(text: str) -> tuple[float, str] | None:
    """Parse `1.5 gb` into 1.5 and `GB`, a key of `UNITS`; return None for anything else."""
    match = _NUMBER.fullmatch(text.strip())
    unit = match[2].upper() if match else ""
    if match is None or unit not in UNITS or not math.isfinite(float(match[1]) * UNITS[unit]):
        return None
    return float(match[1]), unit


def parse_size(text: str, option: str) -> int:
    """Return the bytes of `2GB`, `512MiB`, `1.5e9` or `1000000`.

    Args:
        option: name of the option, for the message.

    Raises:
        ConfigError: it is not a size above 0.
    """
    number, unit = number_and_unit(text) or (0.0, "")
    size = round(number * UNITS[unit])
    if size < 1:
        raise ConfigError(f"{option} {text!r} is not a size above 0, such as 2GB, 512MiB or 1.5e9 (bytes).")
    return size
