"""The plot of `paper`: the largest batch and its throughput against context.

matplotlib is imported only to draw.
"""

from __future__ import annotations

from typing import Any

from specache.bench.base import Result
from specache.bench.plot import new_figure, png

_COLOURS = {  # from Okabe and Ito's palette for colour-blind readers
    ("full", None): "#333333",
    ("kivi", "none"): "#E69F00",
    ("specache", "speculative"): "#0072B2",
    ("specache", "verified"): "#009E73",
}
_LINES = {None: "-", 2: "-", 1: "--"}  # bits -> line style
_PANELS = (("batch", "largest batch"), ("tokens_per_s", "tokens per second"))


def paper_figure(results: list[Result], title: str) -> bytes:
    """Draw two panels over the contexts, both axes logarithmic -> PNG.

    A batch that does not fit has no marker.
    """
    from matplotlib.ticker import LogLocator

    figure, panels = new_figure(9.6, 4.4, len(_PANELS))
    contexts = sorted({result["context"] for result in results})
    for axes, (name, label) in zip(panels, _PANELS, strict=True):
        for method, bits, policy in dict.fromkeys(map(_line, results)):
            shown = [result for result in results if _line(result) == (method, bits, policy) and result["fits"]]
            if shown:
                _draw(axes, shown, name, _COLOURS[method, policy], _LINES[bits], _label(method, bits, policy))
        axes.set(xlabel="tokens of context per sequence", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:,.6g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E3E3E3", linewidth=0.7)
    if any(result["fits"] for result in results):
        panels[0].legend(fontsize=8.5, frameon=False)
    figure.suptitle(title)
    return png(figure)


def _line(result: Result) -> tuple[str, int | None, str | None]:
    return result["method"], result["bits"], result["policy"]


def _draw(axes: Any, shown: list[Result], name: str, colour: str, line: str, label: str) -> None:
    contexts = [result["context"] for result in shown]
    axes.plot(contexts, [result[name] for result in shown], color=colour, linestyle=line, marker="o", markersize=4, label=label)


def _label(method: str, bits: int | None, policy: str | None) -> str:
    if method == "full":
        return "full cache"
    return f"KIVI, {bits}-bit" if method == "kivi" else f"SpeCache, {policy}, {bits}-bit"
