"""`scaling`: time per step against context and batch, with a fitted line for each batch.

A line's intercept is a step's fixed cost, and its slope the cost of a token of context.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from specache.bench.base import BenchContext, Outcome, Result, check_at_least
from specache.bench.cache_options import CacheOptions
from specache.bench.compare import Measured, Skipped, compare
from specache.bench.contenders import DynamicContender, SpeCacheContender
from specache.bench.plot import require_matplotlib, scaling_figure, write_plot
from specache.bench.workload import Workload
from specache.platform.output_files import check_output_file

OURS, STOCK = SpeCacheContender.impl, DynamicContender.impl
FittedLine = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scaling(CacheOptions):
    """Decode steps over contexts and batch sizes. What does not fit into memory is skipped."""

    name: ClassVar[str] = "scaling"
    summary: ClassVar[str] = "time per step against context and batch, fitted and plotted, against transformers' ordinary cache"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("impl", "batch", "context", "ms_per_step", "spread", "tokens_per_s")
    contexts: tuple[int, ...] = field(
        default=tuple(2048 << power for power in range(8)), metadata={"help": "Synthetic tokens per sequence."}
    )
    batches: tuple[int, ...] = field(default=(1, 4, 16), metadata={"help": "Sequences decoded together."})
    steps: int = field(default=5, metadata={"help": "Timed steps of each; they are interleaved."})
    plot: Path | None = field(default=None, metadata={"help": "Draw the steps and the lines into this PNG file."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "contexts", "batches", "steps")
        self.config()
        if self.plot is not None:
            require_matplotlib()
            check_output_file(self.plot, "--plot")

    def run(self, bench: BenchContext) -> Outcome:
        source = bench.model_source
        bench.log(f"Loading {source.name}")
        model = source.load()
        results: list[Result] = []
        for batch in sorted(set(self.batches)):
            for context in sorted(set(self.contexts)):
                work = Workload(model, batch, context, bench.seed)
                measured = compare(work, [SpeCacheContender(work, self.config()), DynamicContender(work)], self.steps, bench.log)
                results += [_result(contender.impl, work, one) for contender, one in measured.items()]
        lines = fitted_lines(results)
        if self.plot is not None:
            write_plot(self.plot.expanduser(), scaling_figure(results, lines, f"{source.name}, {source.weights}"))
        return Outcome(results, {"lines": lines, "slope_ratios": slope_ratios(lines)})


def fitted_lines(results: Iterable[Result]) -> list[FittedLine]:
    """Fit `ms = a_ms + b_us_per_token * context / 1000` per implementation and batch.

    Least squares, where at least two contexts were measured.
    """
    groups: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for result in results:
        if result["ms_per_step"] is not None:
            groups.setdefault((result["impl"], result["batch"]), []).append((result["context"], result["ms_per_step"]))
    lines = []
    for (impl, batch), points in groups.items():
        if len(points) < 2:
            continue
        contexts, times = zip(*points, strict=True)
        slope, intercept = np.polyfit(contexts, times, 1)
        lines.append({"impl": impl, "batch": batch, "a_ms": float(intercept), "b_us_per_token": float(slope) * 1e3})
    return lines


def slope_ratios(lines: Iterable[FittedLine]) -> list[dict[str, Any]]:
    """Return per batch the slope of the ordinary cache over ours."""
    slopes = {(line["impl"], line["batch"]): line["b_us_per_token"] for line in lines}
    ratios = []
    for (impl, batch), slope in slopes.items():
        if impl == OURS and slope > 0 and (STOCK, batch) in slopes:
            ratios.append({"batch": batch, "dynamic_over_specache": slopes[STOCK, batch] / slope})
    return ratios


def _result(impl: str, work: Workload, measured: Measured | Skipped) -> Result:
    timing = measured.timing if isinstance(measured, Measured) else None
    return {
        "impl": impl,
        "batch": work.batch,
        "context": work.context,
        "ms_per_step": None if timing is None else timing.ms,
        "spread": None if timing is None else timing.spread,
        "tokens_per_s": None if timing is None else work.batch * 1e3 / timing.ms,
        "interleaved": measured.interleaved if isinstance(measured, Measured) else None,
        "skipped": measured.reason if isinstance(measured, Skipped) else None,
    }
