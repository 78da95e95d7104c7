"""Format `specache plan`: one line per part and tier, then whether it fits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specache.cli.plan_roofline_table import roofline_tables
from specache.cli.stats_table import size, times
from specache.cli.tier_notice import choice_text
from specache.engine.admission import PARTS
from specache.eval.setting_fields import flag

_TIERS = {"ram-inplace": "main memory, read in place", "ram": "main memory, fetched", "disk": "disk, with checksums"}
_TRAFFIC = {
    "weights": "weights",
    "scan": "low-bit copy",
    "recent": "residual and windows",
    "rows": "16-bit rows fetched",
    "written": "new rows stored",
}


def plan_tables(document: dict[str, Any]) -> RenderableType:
    """Return the report of `plan_document`."""
    parts: list[RenderableType] = [Text(_title(document), style="bold")]
    for table in (_fast_table(document), _other_table(document), _traffic_table(document)):
        parts += [Text(), table]
    parts += [Text(), *_auto_tier(document), *_verdict(document)]
    if "roofline" in document:
        parts += roofline_tables(document)
    return Group(*parts)


def _title(document: dict[str, Any]) -> str:
    config, batch = document["config"], document["batch"]
    sequences = "1 sequence" if batch == 1 else f"{batch:,} sequences"
    method = "the ordinary 16-bit cache" if config["policy"] == "full" else f"{config['bits']}-bit {config['code']}"
    return (
        f"{document['model']}, {sequences} of {document['context']:,} tokens: {method}, policy {config['policy']}, "
        f"slow tier {config['slow_tier']}, {document['dtype']} on {document['device']}"
    )


def _fast_table(document: dict[str, Any]) -> Table:
    planned = document["plan"]
    table = _table("fast memory", "prefill", "decode")
    for name, title in PARTS.items():
        if planned["prefill"][name] or planned["decode"][name]:
            table.add_row(title, size(planned["prefill"][name]), size(planned["decode"][name]))
    table.add_row("in total", size(planned["prefill"]["total"]), size(planned["decode"]["total"]), style="bold")
    return table


def _other_table(document: dict[str, Any]) -> Table:
    planned = document["plan"]
    full = planned["full_cache_bytes"]
    table = _table("other memory", "", "of a 16-bit cache")
    if planned["slow_bytes"]:
        tier = str(document["config"]["slow_tier"])
        table.add_row(f"slow tier ({_TIERS.get(tier, tier)})", size(planned["slow_bytes"]), times(planned["slow_bytes"] / full))
    if kept := planned["checkpoint_bytes"]:
        table.add_row("earlier windows, while there is room", size(kept), times(kept / full))
    if document["static_bytes"]:
        static = document["static_bytes"]
        table.add_row("static buffers of a GPU's decode step", size(static), times(static / full))
    table.add_row("model weights", size(planned["weight_bytes"]), "")
    table.add_row("an ordinary 16-bit cache", size(full), times(1.0))
    table.add_row("low-bit copy and residual", *_copy_share(planned, full))
    return table


def _copy_share(planned: dict[str, Any], full: int) -> tuple[str, str]:
    copy = planned["decode"]["low_bit"] + planned["decode"]["residual"] + planned["decode"]["full_cache"]
    return size(copy), times(copy / full)


def _traffic_table(document: dict[str, Any]) -> Table:
    traffic, batch = document["traffic"], document["batch"]
    columns = ("per step",) if batch == 1 else ("per step", "per token")
    table = _table("expected to move while decoding", *columns)
    for name, title in (*_TRAFFIC.items(), ("total", "in total")):
        if traffic[name]:
            label = f"{title} (assumed: {traffic['assumed_misses']:.2g} of k)" if name == "rows" else title
            values = (traffic[name], traffic[name] / batch)
            table.add_row(label, *(size(value) for value in values[: len(columns)]), style="bold" if name == "total" else None)
    return table


def _auto_tier(document: dict[str, Any]) -> Iterable[Text]:
    """Yield what `--slow-tier auto` would choose on this machine now."""
    chosen = document["auto_tier"]
    if chosen is None:
        return
    if "error" in chosen:
        yield Text(f"--slow-tier auto here, now: {chosen['error']}", style="yellow")
        return
    yield Text(f"--slow-tier auto here, now: {choice_text(chosen, including='with the weights')}")
    if chosen["slow_dir"] is not None:
        tier = document["config"]["slow_tier"]
        yield Text(f"  the figures above are those of --slow-tier {tier}; --slow-tier disk:DIR shows the disk's.")


def _verdict(document: dict[str, Any]) -> Iterable[Text]:
    limit = document["config"]["fast_memory"]
    if limit is None:
        return
    needed = document["plan"]["fast_bytes"]
    if document["fits"]:
        yield Text(f"Fits: needs {size(needed)} of {size(limit)} fast memory.", style="green")
        with_static = document["plan"]["decode"]["total"] + document["static_bytes"]
        if with_static > limit:
            note = f"  a GPU step's static buffers do not: {size(with_static)} with them. Then steps are not captured as a graph."
            yield Text(note, style="yellow")
    else:
        yield Text(f"Does not fit: needs {size(needed)} of fast memory, and there is {size(limit)}.", style="bold red")
        yield from (Text(f"  it fits with {_suggestion_text(one)}") for one in document["suggestions"])
        if document["least_bytes"] > limit:
            yield Text(f"  this context needs {size(document['least_bytes'])} even under the smallest settings", style="yellow")
    context, batch = document["longest_context"], document["largest_batch"]
    yield Text(f"Longest context that fits: {f'{context:,} tokens' if context else 'none'}. Largest batch: {batch or 'none'}.")


def _suggestion_text(suggestion: dict[str, Any]) -> str:
    changes = " ".join(f"--{flag(name)} {value}" for name, value in suggestion["changes"].items())
    return f"{changes}: {size(suggestion['fast_bytes'])}"


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(title, style="dim", min_width=38)
    for column in columns:
        table.add_column(column, justify="right", min_width=9)
    return table
