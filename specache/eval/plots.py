"""Plot a run's rows and cells.

matplotlib is imported only to draw. Its global state is never touched.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from specache.errors import ConfigError
from specache.eval.results import Cell
from specache.eval.table_rows import SCORE, Row, fast_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers, then darker shades.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F", "#004D40", "#5E3C99", "#A6761D")
FULL_COLOUR = "#333333"
MARKERS = "osD^vPX*<>hdp"  # 13 markers and 11 colours: no two of 143 methods share both
LINES = ("-", "--", ":", "-.")  # the pattern changes after each round of the colours
_DPI = 150
SMALLEST = 1e-6  # divergences that plots show, in nats; below it is rounding


class Style(NamedTuple):
    """A method's style: colour and marker of its points, colour and pattern of its lines."""

    colour: str
    marker: str
    line: str


def require_libraries() -> None:
    """Raise `ConfigError` if a library that reports need is not installed."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"reports need {' and '.join(missing)}. Install them with: pip install 'specache[eval]'")


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Return an empty figure of a size in inches, drawn without a screen."""
    require_libraries()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", **options)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.08, h_pad=0.08)  # type: ignore[call-arg]
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def default_figures(rows: list[Row], cells: list[Cell]) -> dict[str, Figure]:
    """Return the plots of a task that draws none of its own, by name.

    They show means, means against memory and, for a divergence, its tail.
    """
    if not rows:
        return {}
    figures = {"mean": mean_figure(rows), "memory": memory_figure(rows)}
    if rows[0]["unit"].startswith("KL"):
        figures["tail"] = tail_figure(rows, cells)
    return figures


def mean_figure(rows: list[Row]) -> Figure:
    """Plot every row's mean with its interval and, for divergences, its 99th percentile."""
    groups = _groups(rows)
    styles = method_styles(rows)
    lines = len(rows) + 1.3 * len(groups)
    figure = new_figure(8.2, 1.1 + 0.27 * lines)
    axes = figure.subplots()
    logarithmic = rows[0]["unit"] != SCORE and rows[0]["unit"].startswith("KL")
    y, ticks, labels = 0.0, [], []
    for group in groups:
        axes.text(0.0, y, f" {group}", transform=axes.get_yaxis_transform(), fontweight="bold", fontsize=9, va="center")
        y += 1.0
        for row in (row for row in rows if row["task"] == group):
            _dot(axes, row, y, styles[row["method"]], logarithmic)
            ticks.append(y)
            labels.append(row["method"])
            y += 1.0
        y += 0.3
    axes.set_yticks(ticks, labels, fontsize=8.5)
    axes.set_ylim(y - 0.3, -0.7)
    _mean_axis(axes, rows, logarithmic)
    return figure


def tail_figure(rows: list[Row], cells: list[Cell]) -> Figure:
    """Plot the share of tokens whose divergence is above a value, per method.

    The further left a line ends, the better the method's worst tokens.
    """
    styles = method_styles(rows)
    figure, panels = _panels(rows)
    for group, axes in panels:
        for method in _methods(row for row in rows if row["task"] == group):
            values = np.sort([v for c in cells if (c["group"], c["method"]) == (group, method) for v in c["values"]])
            if not len(values) or values[-1] < SMALLEST:
                continue  # the full cache has no divergence
            share = 1 - np.arange(len(values)) / len(values)
            shown = values > SMALLEST
            method_style = styles[method]
            axes.plot(
                values[shown], share[shown], color=method_style.colour, linestyle=method_style.line, label=method, linewidth=1.6
            )
        axes.set(xscale="log", yscale="log", title=group, xlabel="KL divergence, nats", ylabel="share of tokens above")
        for share_above, name in ((0.05, "p95"), (0.01, "p99")):
            axes.axhline(share_above, color="#BBBBBB", linewidth=0.8, linestyle=":", zorder=0)
            axes.text(0.0, share_above, f" {name}", transform=axes.get_yaxis_transform(), fontsize=7, color="#888888", va="bottom")
        tidy(axes)
    common_legend(figure, panels)
    return figure


def memory_figure(rows: list[Row]) -> Figure:
    """Plot every method's mean against the fast memory it holds."""
    styles = method_styles(rows)
    figure, panels = _panels(rows)
    logarithmic = rows[0]["unit"].startswith("KL")
    for group, axes in panels:
        for row in (row for row in rows if row["task"] == group):
            if row["mean"] is None or (logarithmic and row["mean"] < SMALLEST):
                continue
            method_style = styles[row["method"]]
            axes.errorbar(
                *(fast_memory(row), row["mean"]),
                yerr=margins(row),
                color=method_style.colour,
                marker=method_style.marker,
                capsize=2.5,
                label=row["method"],
            )
        axes.set(title=group, xlabel="fast memory, share of the 16-bit cache", ylabel=mean_label(rows))
        axes.set_yscale("log" if logarithmic else "linear")
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        if rows[0]["unit"] == SCORE:
            axes.set_ylim(-0.02, 1.02)
        tidy(axes)
    common_legend(figure, panels)
    return figure


def method_styles(rows: Iterable[Row]) -> dict[str, Style]:
    """Return the style of each method, the same in all plots of a report."""
    styles = {}
    number = 0
    for method in _methods(rows):
        if method == "full":
            styles[method] = Style(FULL_COLOUR, "o", "-")
            continue
        styles[method] = style(number)
        number += 1
    return styles


def style(number: int) -> Style:
    """Return the style of a method by its number. No two numbers have the same style."""
    rounds, colour = divmod(number, len(COLOURS))
    return Style(COLOURS[colour], MARKERS[number % len(MARKERS)], LINES[rounds % len(LINES)])


def margins(row: Row) -> list[list[float]] | None:
    """Return the error bars [[below], [above]] of a row's mean."""
    if row["mean"] is None or None in row["ci95"]:
        return None
    low, high = row["ci95"]
    return [[max(0.0, row["mean"] - low)], [max(0.0, high - row["mean"])]]


def mean_label(rows: list[Row]) -> str:
    """Return the label of the mean axis."""
    unit = rows[0]["unit"]
    return "mean score" if unit == SCORE else f"mean {unit}"


def _dot(axes: Axes, row: Row, y: float, method_style: Style, logarithmic: bool) -> None:
    if row["mean"] is None or (logarithmic and row["mean"] < SMALLEST):
        text = "no value" if row["mean"] is None else " 0" if row["mean"] == 0 else f" < {SMALLEST:g}"
        axes.text(0.0, y, text, transform=axes.get_yaxis_transform(), fontsize=8, va="center")
        return
    axes.errorbar(
        row["mean"], y, xerr=margins(row), color=method_style.colour, marker="o", markersize=5, capsize=2.5, linewidth=1.6
    )
    if logarithmic and row["p99"]:
        axes.plot(row["p99"], y, color=method_style.colour, marker="D", markersize=4, markerfacecolor="white", linestyle="none")
        axes.plot([row["mean"], row["p99"]], [y, y], color=method_style.colour, linewidth=0.7, linestyle=":", zorder=0)


def _mean_axis(axes: Axes, rows: list[Row], logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlabel("KL divergence, nats: mean with its 95% interval, and 99th percentile (hollow)")
    elif rows[0]["unit"] == SCORE:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("mean score with its 95% interval")
    else:
        axes.set_xlabel(f"{mean_label(rows)} with its 95% interval")
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _panels(rows: list[Row]) -> tuple[Figure, list[tuple[str, Axes]]]:
    """Return a figure with one panel per group, and space for a legend below."""
    groups = _groups(rows)
    across = min(3, len(groups))
    down = math.ceil(len(groups) / across)
    legend = 0.22 * math.ceil(len(_methods(rows)) / 2) + 0.3
    figure = new_figure(max(6.2, 4.1 * across), 3.2 * down + legend)
    axes = figure.subplots(down, across, squeeze=False).reshape(-1)
    for unused in axes[len(groups) :]:
        unused.set_visible(False)
    return figure, list(zip(groups, axes, strict=False))


def common_legend(figure: Figure, panels: list[tuple[str, Axes]]) -> None:
    """Draw one legend below all panels."""
    entries: dict[Any, Any] = {}
    for _, axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)


def tidy(axes: Axes) -> None:
    """Set a thin grid, two spines and small letters."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.title.set_fontsize(10)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.tick_params(labelsize=8.5)


def _groups(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _methods(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))
