"""The columns of a result table, the same in the terminal and in the HTML report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from specache.eval.table_rows import MORE, Row

NOTHING = "-"
_KEPT = "of the items (or tokens of a given answer) that the full cache gets right, the share that stays right"


@dataclass(frozen=True)
class Column:
    """One column of a result table.

    Attributes:
        title: shown at its head.
        text: a row's text in it.
        meaning: explains the column in the report.
        margin: a row's confidence interval, or `None`.
    """

    title: str
    text: Callable[[Row], str]
    meaning: str
    margin: Callable[[Row], list[float | None] | None] = lambda row: None


def columns(rows: list[Row]) -> list[Column]:
    """Return the columns that have a text for at least one of the rows."""
    return [column for column in _all_columns(rows) if any(column.text(row) != NOTHING for row in rows)]


def with_margin(value: float | None, interval: list[float | None] | None) -> str:
    """Format a value as `0.0021 ± 0.0004`.

    The margin is the longer side of the 95% interval. Both are rounded to two digits of it.
    """
    if value is None:
        return NOTHING
    bounds = [bound for bound in interval or [] if bound is not None]
    margin = max((abs(bound - value) for bound in bounds), default=0.0)
    if margin == 0:
        return number(value)
    if margin < 1e-5:
        return f"{value:.2g} ± {margin:.1g}"
    decimals = min(6, max(0, 1 - math.floor(math.log10(margin))))
    return f"{value:.{decimals}f} ± {margin:.{decimals}f}"


def number(value: float | None) -> str:
    """Format a value with three significant digits."""
    return NOTHING if value is None else f"{value:.3g}"


def times(ratio: float | None) -> str:
    """Format a ratio to the ordinary cache's bytes."""
    return NOTHING if ratio is None else f"{ratio:.3f}x"


def percent(share: float | None) -> str:
    """Format a rate."""
    return NOTHING if share is None else f"{share:.1%}"


def interval_text(interval: list[float | None] | None) -> str:
    """Format an interval as `95%: 0.0017 to 0.0026`."""
    if not interval or any(bound is None for bound in interval):
        return ""
    return f"95%: {number(interval[0])} to {number(interval[1])}"


def _all_columns(rows: list[Row]) -> list[Column]:
    unit = rows[0]["unit"] if rows else ""
    return [
        _estimate_column("mean", "ci95", f"mean ({unit})", "average over all tokens (distributions) or items (scores)"),
        _estimate_column("p95", "p95_ci95", "p95", "95th percentile over all tokens"),
        _estimate_column("p99", "p99_ci95", "p99", "99th percentile over all tokens"),
        _estimate_column("top1", "top1_ci95", "top-1", "share of tokens whose likeliest next token is that of the full cache"),
        _estimate_column("ppl", "ppl_ci95", "perplexity", "exp of the mean negative log-likelihood"),
        _estimate_column("delta", "delta_ci95", "against full", "paired difference to the full cache on the same items"),
        _estimate_column(
            "nll_delta", "nll_delta_ci95", "NLL against full", "paired difference of the negative log-likelihood, nats per token"
        ),
        _estimate_column("kept", "kept_ci95", "kept", _KEPT),
        Column("of", lambda row: NOTHING if row["kept_n"] is None else str(row["kept_n"]), "what the full cache gets right"),
        Column("fast", lambda row: times(row["fast_ratio"]), "fast memory, as a share of the ordinary 16-bit cache"),
        Column(
            "hot", lambda row: times(row["hot_ratio"]) if row["hot_ratio"] else NOTHING, "recently fetched pairs, as such a share"
        ),
        Column("memory", _memory, "fast and hot memory compared with specache"),
        Column("hits", lambda row: percent(row["hit_rate"]), "rows needed that were already in fast memory"),
        Column("guesses", lambda row: percent(row["guess_rate"]), "speculative tokens that were right"),
        Column("n", lambda row: str(row["n"]), "items"),
    ]


def _estimate_column(key: str, interval: str, title: str, meaning: str) -> Column:
    return Column(title, lambda row: with_margin(row[key], row[interval]), meaning, lambda row: row[interval])


def _memory(row: Row) -> str:
    if row["memory"] is None:
        return NOTHING
    return str(row["memory"]).upper() if row["memory"] == MORE else str(row["memory"])
