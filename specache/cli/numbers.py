"""Check the ranges of numeric options, for every command."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from specache.errors import ConfigError
from specache.eval.setting_fields import flag

LARGEST_COUNT = 2**31 - 1  # limit of tokens, pairs and steps; sizes in bytes are written as texts (2GB)
_RANGES = {  # by option name; others: up to LARGEST_COUNT, and commands check the lower bound
    "seed": (0, 2**64 - 1),  # seeds of PyTorch
    "threads": (1, max(1024, os.cpu_count() or 1)),
}


def check_numbers(values: Mapping[str, Any]) -> None:
    """Check the values of a command's options, by the names of its parameters.

    Raises:
        ConfigError: an integer is out of range, or a float is not finite.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{flag(name)} must be a finite number, got {value}.")
        if isinstance(value, int) and not isinstance(value, bool):
            _check_whole(name, value)


def _check_whole(name: str, value: int) -> None:
    if name in _RANGES:
        least, most = _RANGES[name]
        if not least <= value <= most:
            raise ConfigError(f"--{flag(name)} must be from {least} to {most:,}, got {value}.")
    elif value > LARGEST_COUNT:
        raise ConfigError(f"--{flag(name)} must be at most {LARGEST_COUNT:,}, got {value}.")
