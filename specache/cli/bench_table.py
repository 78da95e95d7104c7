"""Format the results of a benchmark as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specache.cli.stats_table import UNKNOWN, size

_TEXT = (
    "impl",
    "isa",
    "cache",
    "weights",
    "tier",
    "policy",
    "method",
    "limited_by",
    "shape",
    "matrix",
    "format",
)  # columns of text
_SHARES = ("rows_ready", "read_hidden", "hit_rate", "vs_read", "alike")
_TITLES = {"gb_per_s": "GB/s", "ms_per_step": "ms per step", "tokens_per_s": "tokens/s"}


def result_table(results: list[dict[str, Any]], columns: Sequence[str], details: dict[str, Any]) -> RenderableType:
    """Return one line per result, then why results were skipped, and the details of the run."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    shown = [column for column in columns if any(result.get(column) is not None for result in results)]
    for column in shown:
        words = column in _TEXT
        table.add_column(_title(column), justify="left" if words else "right", no_wrap=column == "impl", overflow="fold")
    for result in results:
        if result.get("skipped") is None:
            table.add_row(*(_text(column, result.get(column)) for column in shown))
    parts: list[RenderableType] = [table, *_skipped(results)]
    parts += [Text(f"{_title(name)}: {_text(name, entry)}", style="dim") for name, entry in _entries(details)]
    return Group(*parts)


def _title(name: str) -> str:
    return _TITLES.get(name, name.removesuffix("_bytes").replace("_", " "))


def _skipped(results: list[dict[str, Any]]) -> list[Text]:
    """Return a line per result that was not measured."""
    lines = []
    for result in results:
        if result.get("skipped") is not None:
            bits = result.get("bits")
            named = (result.get("impl") or result.get("method"), result.get("cache"), result.get("policy"), bits and f"{bits}-bit")
            what = " ".join(filter(None, (*named, *(result.get(key) for key in ("shape", "matrix", "format")))))
            load = _load(result)
            lines.append(Text(f"{what}, {load}, was skipped: {result['skipped']}", style="yellow"))
    return lines


def _load(result: dict[str, Any]) -> str:
    if "context" in result:
        return f"{result.get('batch') or 1} x {result['context']:,} tokens"
    unit = "requests" if "requests" in result else "rows"
    return f"{result[unit]} {unit}"


def _entries(details: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, entry) for name, value in details.items() for entry in (value if isinstance(value, list) else [value])]


def _text(column: str, value: Any) -> str:
    if value is None:
        return UNKNOWN
    if column.endswith("_bytes"):
        return size(value)
    if column == "spread":
        return f"{_number(value[0])} to {_number(value[1])}"
    if column in _SHARES:
        return f"{value:.0%}"
    if column.startswith("vs_") or "_vs_" in column:
        return f"{_number(value)}x"
    return _brief(value)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(one)}" for key, one in value.items())
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Format with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
