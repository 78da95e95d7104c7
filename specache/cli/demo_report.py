"""Format the demo's comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specache.cli.answering import Result
from specache.cli.stats_table import percent, rate, seconds, size, times, total_ratio
from specache.config import SpeCacheConfig

KIVI_RESIDUAL = 128  # tokens


@dataclass(frozen=True)
class Run:
    """One compared cache's answer and statistics."""

    name: str
    result: Result
    right: bool
    stats: dict[str, Any]
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "right": self.right,
            **self.result.to_dict(),
            "config": self.config,
            "stats": self.stats,
        }


def comparison(runs: list[Run], config: SpeCacheConfig) -> RenderableType:
    """Return all runs side by side, with notes on reading the table."""
    table = Table(title_justify="left", pad_edge=False)
    table.add_column()
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    table.add_row("answer", *(" ".join(run.result.text.split()) for run in runs))
    table.add_row("", *(_verdict(run) for run in runs), end_section=True)
    for label, cell in _STATISTICS:
        table.add_row(label, *(cell(run.stats) for run in runs))
    return Group(table, Text(_notes(config), style="dim"))


def _verdict(run: Run) -> Text:
    if run.result.finish_reason == "interrupted":
        return Text("interrupted", style="yellow")
    return Text("right", style="bold green") if run.right else Text("wrong", style="bold red")


def _with_ratio(count: float, ratio: float | None) -> str:
    return f"{size(count)} ({times(ratio)})" if count else "-"


_STATISTICS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("fast memory", lambda stats: _with_ratio(stats["fast_bytes"], stats["fast_ratio"])),
    ("  and its hot set", lambda stats: _with_ratio(stats["hot_bytes"], stats["hot_ratio"])),
    ("slow memory", lambda stats: size(stats["slow_bytes"]) if stats["slow_bytes"] else "-"),
    ("in total", lambda stats: _with_ratio(stats["total_bytes"], total_ratio(stats))),
    ("guesses right", lambda stats: percent(stats["guess_rate"])),
    ("prefetch hits", lambda stats: percent(stats["hit_rate"])),
    ("time to first token", lambda stats: seconds(stats["time_to_first_token_s"])),
    ("tokens per second", lambda stats: rate(stats["tokens_per_s"])),
)


def _notes(config: SpeCacheConfig) -> str:
    as_kivi = "as KIVI does" if config.residual == KIVI_RESIDUAL else f"where KIVI itself keeps {KIVI_RESIDUAL}"
    return (
        f"Ratios compare with an ordinary 16-bit cache. All three share one prefill, so the low bits alone also keep the "
        f"newest {config.residual} tokens at 16 bits, {as_kivi}. Slow memory is RAM here: the demo "
        "shows the method at work, not memory saved in total; that takes a GPU beside the RAM."
    )
