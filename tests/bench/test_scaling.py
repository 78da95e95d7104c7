"""`bench scaling`: fitted lines, and settings that do not fit into memory."""

from __future__ import annotations

import pytest

from specache.bench import compare as comparison
from specache.bench.base import BenchContext
from specache.bench.scaling import Scaling, fitted_lines, slope_ratios
from specache.errors import ConfigError
from tests.bench.tiny_shape import tiny_model


def result(impl: str, batch: int, context: int, ms: float | None) -> dict:
    return {"impl": impl, "batch": batch, "context": context, "ms_per_step": ms}


def test_fitted_lines_recover_the_costs_and_slopes_are_compared_per_batch():
    results = [result("specache", 1, c, 20 + 0.001 * c) for c in (1000, 2000, 8000)]
    results += [result("dynamic", 1, c, 10 + 0.008 * c) for c in (1000, 2000, 8000)]
    results += [result("dynamic", 4, 1000, 50.0), result("dynamic", 4, 2000, None)]
    lines = fitted_lines(results)
    assert [(line["impl"], line["batch"]) for line in lines] == [("specache", 1), ("dynamic", 1)]
    assert lines[0]["a_ms"] == pytest.approx(20) and lines[0]["b_us_per_token"] == pytest.approx(1)
    assert slope_ratios(lines) == [{"batch": 1, "dynamic_over_specache": pytest.approx(8)}]


def test_contexts_and_batches_are_measured_and_plotted(tmp_path):
    plot = tmp_path / "scaling.png"
    benchmark = Scaling(contexts=(512, 256), batches=(2, 1), steps=1, top_k=8, plot=plot)
    outcome = benchmark.run(BenchContext(tiny_model()))
    measured = [(r["impl"], r["batch"], r["context"]) for r in outcome.results]
    assert measured == [(impl, b, c) for b in (1, 2) for c in (256, 512) for impl in ("specache", "dynamic")]
    assert all(r["ms_per_step"] > 0 and r["skipped"] is None for r in outcome.results)
    assert len(outcome.details["lines"]) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_context_that_does_not_fit_says_how_much_memory_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "memory", lambda: {"usable_bytes": 10**6})
    plot = tmp_path / "scaling.png"
    outcome = Scaling(contexts=(256, 10**6), batches=(1,), steps=1, plot=plot).run(BenchContext(tiny_model()))
    small, large = outcome.results[:2], outcome.results[2:]
    assert all(r["ms_per_step"] is not None for r in small)
    assert all(r["ms_per_step"] is None and "GB of memory" in r["skipped"] for r in large)
    assert outcome.details["lines"] == [] and plot.exists()


def test_a_plot_needs_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        Scaling(plot=tmp_path / "nowhere" / "scaling.png")
