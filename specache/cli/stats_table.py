"""Format statistics for people. All numbers come from `SpeCache.stats()`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

UNKNOWN = "-"


def size(count: float | None) -> str:
    """Format bytes in a fitting unit."""
    if count is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def percent(ratio: float | None) -> str:
    """Format a share, or a dash if it was not measured."""
    return UNKNOWN if ratio is None else f"{ratio:.0%}"


def times(ratio: float | None) -> str:
    """Format a factor."""
    return UNKNOWN if ratio is None else f"{ratio:.2f}x"


def seconds(duration: float | None) -> str:
    """Format a duration."""
    return UNKNOWN if duration is None else f"{duration:.2f} s"


def rate(per_second: float | None) -> str:
    """Format tokens per second."""
    return UNKNOWN if per_second is None else f"{per_second:.1f}"


def total_ratio(stats: dict[str, Any]) -> float | None:
    """Return the memory of all tiers as a share of an ordinary 16-bit cache."""
    return stats["total_bytes"] / stats["full_bytes"] if stats["full_bytes"] else None


def statistics_table(stats: dict[str, Any], config: dict[str, Any]) -> Table:
    """Return one run's statistics, one per line."""
    table = Table(title=_title(config), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in _memory_rows(stats, config) + _speed_rows(stats):
        table.add_row(*row)
    return table


def _title(config: dict[str, Any]) -> str:
    if config["policy"] == "full":
        return "the ordinary 16-bit cache"
    return f"{config['bits']}-bit {config['code']}, policy {config['policy']}, slow tier {config['slow_tier']}"


def _memory_rows(stats: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [("fast memory", size(stats["fast_bytes"]), f"{times(stats['fast_ratio'])} of a 16-bit cache")]
    if stats["hot_bytes"]:
        rows.append(("hot set", size(stats["hot_bytes"]), f"{times(stats['hot_ratio'])}, recently fetched pairs"))
    if stats["window_bytes"]:
        rows.append(("sliding windows", size(stats["window_bytes"]), f"{times(stats['model_ratio'])} with all layers"))
    if stats["checkpoint_bytes"]:
        rows.append(("earlier windows", size(stats["checkpoint_bytes"]), "to go back to; given up where memory is short"))
    if stats["slow_bytes"]:
        title = "on disk" if config["slow_tier"] == "disk" else "slow memory"
        where = "read where they lie" if config["slow_tier"] == "ram-inplace" else "fetched when needed"
        rows.append((title, size(stats["slow_bytes"]), f"16-bit pairs, {where}"))
    rows.append(("in total", size(stats["total_bytes"]), f"{times(total_ratio(stats))} of a 16-bit cache"))
    return rows


def _speed_rows(stats: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    if stats["guess_rate"] is not None:
        rows.append(("guesses right", percent(stats["guess_rate"]), "speculative tokens that came true"))
    if stats["hit_rate"] is not None:
        rows.append(("prefetch hits", percent(stats["hit_rate"]), f"waited {seconds(stats['wait_s'])} for the rest"))
    rows.append(("prefill", seconds(stats["prefill_s"]), ""))
    rows.append(("first token after", seconds(stats["time_to_first_token_s"]), ""))
    rows.append(("tokens per second", rate(stats["tokens_per_s"]), "while decoding"))
    if stats["compiled_steps"] or stats["compile_error"]:
        steps = f"{stats['compiled_steps']:,} of {stats['decode_steps']:,}"
        rows.append(("compiled steps", steps, stats["compile_error"] or "in 16 bits they round differently"))
    return rows
