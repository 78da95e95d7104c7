"""The numbers of the engine's status, for `/v1/status` and `/metrics`."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

_TEXTS = ("error", "problem")


def service_numbers(status: Any) -> dict[str, Any]:
    """Return the numbers of a `ServiceStatus`, and under `prefixes` those of the store or `None`.

    Numbers that are not known are `None`. Texts, such as paths, are left out.
    """
    fields = dict(vars(status))
    store = fields.pop("prefixes")
    return {**_numbers(fields), "prefixes": None if store is None else _store_numbers(store.to_dict())}


def flat_numbers(status: Any) -> dict[str, float]:
    """Return the numbers that are known; those of the store begin with `prefix_`."""
    numbers = service_numbers(status)
    store = numbers.pop("prefixes") or {}
    numbers |= {f"prefix_{name}": value for name, value in store.items()}
    return {name: float(value) for name, value in numbers.items() if value is not None}


@cache
def totals() -> frozenset[str]:
    """Return the names of `flat_numbers` that only grow."""
    from specache.engine.prefix_status import PrefixCounters
    from specache.engine.service_status import COUNTED, Totals

    counted = (name for name in vars(Totals()) if not name.startswith("_"))
    return frozenset({*counted, *COUNTED, *(f"prefix_{field.name}" for field in fields(PrefixCounters))})


def in_seconds(name: str) -> str:
    """Return a number's name with its unit spelled out, as Prometheus' names have it."""
    return f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name


def _store_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    stored = fields.pop("prefixes")
    return _numbers({"stored": stored, **fields, **fields["counters"]})


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: value for name, value in fields.items() if value is None or isinstance(value, bool | int | float)}
    return {name: value for name, value in numbers.items() if name not in _TEXTS}
