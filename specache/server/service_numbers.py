"""The numbers of the engine's status, flat: for `/v1/status` and `/metrics`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

NAMES = (  # always present, `None` where the engine does not know
    *("waiting", "running", "prompt_tokens_read", "prompt_tokens_cached"),
    *("fast_bytes", "fast_budget_bytes", "slow_bytes", "hit_rate"),
)


def service_numbers(status: Any) -> dict[str, float | None]:
    """Return the numbers of a dataclass. Those of dataclasses and mappings in it get a prefix."""
    numbers: dict[str, float | None] = dict.fromkeys(NAMES)
    numbers.update(_flat(status, ""))
    return numbers


def _flat(value: Any, prefix: str) -> dict[str, float]:
    if isinstance(value, Mapping):
        fields = {str(name): one for name, one in value.items()}
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return {}
    found: dict[str, float] = {}
    for name, one in fields.items():
        if isinstance(one, bool | int | float):
            found[f"{prefix}{name}"] = one
        else:
            found |= _flat(one, f"{prefix}{name}_")
    return found
