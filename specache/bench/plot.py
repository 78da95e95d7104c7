"""The plot of `scaling`, and helpers that the plots share.

matplotlib is imported only to draw. Its global state is never touched.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from specache.errors import BenchmarkError, ConfigError
from specache.platform.output_files import write_whole

COLOURS = {"specache": "#0072B2", "dynamic": "#333333"}  # from Okabe and Ito's palette for colour-blind readers
MARKERS = "os^Dv"


def require_matplotlib() -> None:
    """Raise `ConfigError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib. Install it with: pip install 'specache[bench]'")


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """Return a figure of a size in inches, and its axes (for several panels, an array of them)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels)


def png(figure: Any) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def write_plot(path: Path, image: bytes) -> None:
    """Write an image. Raise `BenchmarkError` if it cannot be written."""
    try:
        write_whole(path, image)
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror or error}. Choose another --plot.") from error


def scaling_figure(results: list[dict[str, Any]], lines: list[dict[str, Any]], title: str) -> bytes:
    """Draw the time per step against context -> PNG.

    Measurements are markers with their quartiles, and each implementation and batch has a fitted
    line.
    """
    figure, axes = new_figure(7.0, 4.6)
    markers = dict(zip(sorted({result["batch"] for result in results}), MARKERS * len(results), strict=False))
    measured = [result for result in results if result["ms_per_step"] is not None]
    for impl, batch in dict.fromkeys((result["impl"], result["batch"]) for result in measured):
        shown = [result for result in measured if (result["impl"], result["batch"]) == (impl, batch)]
        _draw(axes, shown, COLOURS[impl], markers[batch], f"{impl}, batch {batch}")
    for line in lines:
        contexts = [r["context"] for r in measured if (r["impl"], r["batch"]) == (line["impl"], line["batch"])]
        ends = [min(contexts), max(contexts)]
        times = [line["a_ms"] + line["b_us_per_token"] * context / 1e3 for context in ends]
        axes.plot(ends, times, color=COLOURS[line["impl"]], linewidth=0.8)
    axes.set(title=title, xlabel="tokens of context per sequence", ylabel="ms per step")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E3E3E3", linewidth=0.7)
    if measured:
        axes.legend(fontsize=8.5, frameon=False)
    return png(figure)


def _draw(axes: Any, shown: list[dict[str, Any]], colour: str, marker: str, label: str) -> None:
    """Draw the measurements of one implementation and batch."""
    times = [result["ms_per_step"] for result in shown]
    below = [max(0.0, result["ms_per_step"] - result["spread"][0]) for result in shown]
    above = [max(0.0, result["spread"][1] - result["ms_per_step"]) for result in shown]
    contexts = [result["context"] for result in shown]
    axes.errorbar(
        contexts, times, yerr=[below, above], color=colour, marker=marker, markersize=4, capsize=2, linestyle="none", label=label
    )
