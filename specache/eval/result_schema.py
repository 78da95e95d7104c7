"""Check what is read from a result folder, before any figure is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _series(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_numbers, value.values()))


def _methods(value: Any) -> bool:
    return isinstance(value, dict) and all(not wrong_fields(method, _METHOD) for method in value.values())


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _origins(value: Any) -> bool:
    return isinstance(value, list) and all(_object(one) and _text(one.get("commit") or "") for one in value)


def _date(value: Any) -> bool:
    try:
        return value is None or bool(datetime.fromisoformat(value))
    except (TypeError, ValueError):
        return False


_STATS: Mapping[str, Check] = {"fast_ratio": _number, "hot_ratio": _number}
_RATES: Mapping[str, Check] = {"hit_rate": _number_or_none, "guess_rate": _number_or_none}
_METHOD: Mapping[str, Check] = {"name": _text, "settings": _object}
_CELL: Mapping[str, Check] = {
    "item": _text,
    "group": _text,
    "index": _whole,
    "method": _text,
    "values": _numbers,
    "tokens": _series,
    "details": _object,
    "facts": _object,
    "stats": _object,
    "seconds": _number,
}
_RUN: Mapping[str, Check] = {
    "task": _text,
    "settings": _object,
    "model": _text,
    "dtype": _text,
    "seed": _whole,
    "unit": _text,
    "methods": _methods,
    "skipped": _texts,
}
_LATER: Mapping[str, Check] = {"origins": _origins, "began": _date}  # runs of earlier versions lack these


def wrong_fields(value: Any, checks: Mapping[str, Check]) -> list[str]:
    """Return the fields of an object that are missing or wrong, all of them if it is no object."""
    if not isinstance(value, dict):
        return list(checks)
    return [name for name, check in checks.items() if name not in value or not check(value[name])]


def no_number(constant: str) -> Any:
    """Refuse `NaN` and `Infinity`, which Python's JSON reads and no result has."""
    raise ValueError(f"{constant} is no number")


def cell_problem(cell: Any) -> str | None:
    """Return why a line of `cells.jsonl` is no result, or `None`."""
    missing = [name for name in _CELL if not isinstance(cell, dict) or name not in cell]
    if missing:
        return f"it lacks {', '.join(missing)}"
    wrong = wrong_fields(cell, _CELL)
    wrong += [] if "stats" in wrong else [f"stats.{name}" for name in _wrong_stats(cell["stats"])]
    if wrong:
        return f"{', '.join(wrong)} cannot be what was measured"
    counts = {len(figures) for figures in cell["tokens"].values() if figures}
    return None if counts <= {len(cell["values"])} else "it has more figures of one kind than of another"


def run_problem(document: Any) -> str | None:
    """Return why the content of `run.json` describes no run, or `None`."""
    wrong = wrong_fields(document, _RUN)
    if isinstance(document, dict):
        wrong += wrong_fields(document, {name: check for name, check in _LATER.items() if name in document})
    return f"{', '.join(wrong)} missing or not what a run has" if wrong else None


def _wrong_stats(stats: dict[str, Any]) -> list[str]:
    return wrong_fields(stats, _STATS) + wrong_fields(stats, {name: check for name, check in _RATES.items() if name in stats})
