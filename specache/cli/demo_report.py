"""Format the demo's comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specache.cli.answering import Result
from specache.cli.stats_table import UNKNOWN, percent, rate, seconds, size, times, total_ratio
from specache.config import SpeCacheConfig

KIVI_RESIDUAL = 128  # tokens


@dataclass(frozen=True)
class Run:
    """One compared cache's answer and statistics."""

    name: str
    result: Result
    right: bool
    reused_tokens: int  # of the prompt: they were in the cache
    stats: dict[str, Any]
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "right": self.right,
            **self.result.to_dict(),
            "reused_tokens": self.reused_tokens,
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
    for label, cell in _STATISTICS.items():
        cells = [cell(run.stats) for run in runs]
        if set(cells) != {UNKNOWN}:  # nothing is guessed or prefetched where rows are read in place
            table.add_row(label, *cells)
    return Group(table, Text(_notes(config), style="dim"))


def second_question(first: Run, again: Run) -> RenderableType:
    """Return what the second question took from the session, beside what the first one took."""
    table = Table(title_justify="left", pad_edge=False)
    table.add_column()
    table.add_column("first question", justify="right")
    table.add_column("second, from its session", justify="right")
    table.add_row("answer", _verdict(first), _verdict(again))
    table.add_row("tokens read for it", f"{first.result.prompt_tokens:,}", f"{again.result.prompt_tokens - again.reused_tokens:,}")
    for label in ("fast memory", "  and its hot set"):
        table.add_row(label, *(_STATISTICS[label](run.stats) for run in (first, again)))
    table.add_row("slow memory", f"{size(first.stats['slow_bytes'])} of RAM", f"{size(again.stats['slow_bytes'])} on disk")
    for label in ("time to first token", "tokens per second"):
        table.add_row(label, *(_STATISTICS[label](run.stats) for run in (first, again)))
    return table


def _verdict(run: Run) -> Text:
    if run.result.finish_reason == "interrupted":
        return Text("interrupted", style="yellow")
    return Text("right", style="bold green") if run.right else Text("wrong", style="bold red")


def _with_ratio(count: float, ratio: float | None) -> str:
    return f"{size(count)} ({times(ratio)})" if count else "-"


_STATISTICS: dict[str, Callable[[dict[str, Any]], str]] = {
    "fast memory": lambda stats: _with_ratio(stats["fast_bytes"], stats["fast_ratio"]),
    "  and its hot set": lambda stats: _with_ratio(stats["hot_bytes"], stats["hot_ratio"]),
    "slow memory": lambda stats: size(stats["slow_bytes"]) if stats["slow_bytes"] else "-",
    "in total": lambda stats: _with_ratio(stats["total_bytes"], total_ratio(stats)),
    "guesses right": lambda stats: percent(stats["guess_rate"]),
    "prefetch hits": lambda stats: percent(stats["hit_rate"]),
    "time to first token": lambda stats: seconds(stats["time_to_first_token_s"]),
    "tokens per second": lambda stats: rate(stats["tokens_per_s"]),
}


def _notes(config: SpeCacheConfig) -> str:
    as_kivi = "as KIVI does" if config.residual == KIVI_RESIDUAL else f"where KIVI itself keeps {KIVI_RESIDUAL}"
    return (
        f"Ratios compare with an ordinary 16-bit cache. All three share one prefill, so the low bits alone also keep the "
        f"newest {config.residual} tokens at 16 bits, {as_kivi}. Slow memory is RAM here, which "
        "buys speed and saves none; from a disk, below, all but fast memory and hot set leaves the RAM."
    )
