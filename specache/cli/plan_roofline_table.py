"""Format `specache plan --gpu`: figures and sources, batches, step times, tipping points."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from specache.cli.stats_table import UNKNOWN, size, times

_FIGURES = {
    "memory_gib": ("memory", "GiB"),
    "memory_gb_per_s": ("memory bandwidth", "GB/s"),
    "matrix_tflops": ("16-bit matrix products, dense", "TFLOP/s"),
    "vector_tflops": ("float32 arithmetic", "TFLOP/s"),
    "link_gb_per_s": ("host link", "GB/s"),
    "host_memory_gib": ("main memory", "GiB"),
    "disk_gb_per_s": ("disk", "GB/s"),
}
_PARTS = ("weights", "compute", "scan", "attend", "fetch", "overhead")


def roofline_tables(document: dict[str, Any]) -> list[RenderableType]:
    """Return the part of the report about time."""
    roofline, context, batch = document["roofline"], document["context"], document["batch"]
    found = roofline["methods"]
    parts: list[RenderableType] = [Text(), Text(f"On {roofline['device']['name']}", style="bold"), Text()]
    parts += [_figures(roofline), Text(), _batches(found, context)]
    parts += [Text(), _steps(found, "largest", f"ms per step, each at its largest batch, {context:,} tokens")]
    parts += [Text(), _steps(found, "asked", f"ms per step at batch {batch:,}, {context:,} tokens")]
    return [*parts, Text(), _wins(found, context, batch)]


def _figures(roofline: dict[str, Any]) -> Table:
    device = roofline["device"]
    table = _table("figure", "", "source", justify="left")
    for key, (title, unit) in _FIGURES.items():
        if device[key] is not None:
            title = f"{title} ({device['link']})" if key == "link_gb_per_s" and device["link"] else title
            table.add_row(title, f"{device[key]:,.4g} {unit}", device["sources"][key])
    shares = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in device["efficiency"].items())
    table.add_row("assumed to be reached", "", shares)
    return table


def _batches(found: list[dict[str, Any]], context: int) -> Table:
    table = _table(
        f"largest batch, {context:,} tokens",
        *("fast memory", "static", "slow tier", "batch", "of full", "tokens/s", "of full", "per sequence"),
    )
    for one in found:
        at = one["largest"]
        if not at["batch"]:
            table.add_row(one["title"], *[UNKNOWN] * 3, "0", *[UNKNOWN] * 4)
            continue
        ratio, rate = one["vs_full"], at["tokens_per_s"]
        table.add_row(
            *(one["title"], size(at["fast_bytes"]), size(at["static_bytes"]) if at["static_bytes"] else UNKNOWN),
            *(size(at["slow_bytes"]), f"{at['batch']:,}", times(ratio["batch"])),
            *(f"{rate:,.1f}", times(ratio["tokens_per_s"]), f"{rate / at['batch']:.1f}"),
        )
    return table


def _steps(found: list[dict[str, Any]], which: str, title: str) -> Table:
    table = _table(title, *_PARTS, "in total", "hidden: compute", "fetch", "scan waits for")
    for one in found:
        step = one[which]["step"]
        if step is None:
            continue
        name = one["title"] if one[which].get("fits", True) else f"{one['title']} (does not fit)"
        values = [step[f"{part}_ms"] for part in _PARTS]
        values += [step["total_ms"], step["compute_hidden_ms"], step["fetch_hidden_ms"]]
        table.add_row(name, *(_ms(value) for value in values), step["scan_bound"])
    return table


def _wins(found: list[dict[str, Any]], context: int, batch: int) -> Table:
    table = _table("wins from, by 1% or more", f"step, batch {batch:,}", f"step, {context:,} tokens", "tokens/s, largest batches")
    for one in found[1:]:
        at = one["wins_from"]
        table.add_row(
            *(one["title"], _from(at["context"], "{:,} tokens"), _from(at["batch"], "batch {:,}")),
            _from(at["throughput_context"], "{:,} tokens"),
        )
    return table


def _from(value: int | None, written: str) -> str:
    return "never" if value is None else written.format(value)


def _ms(value: float) -> str:
    return UNKNOWN if abs(value) < 0.005 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _table(title: str, *columns: str, justify: Any = "right") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(title, style="dim", min_width=24)
    for column in columns:
        table.add_column(column, justify=justify, overflow="fold")
    return table
