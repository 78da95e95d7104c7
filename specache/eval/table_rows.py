"""Aggregate cells to rows: one per group of items and method, with 95% confidence intervals."""

from __future__ import annotations

import math
from typing import Any

from specache.eval import statistics
from specache.eval.results import Cell, Run
from specache.eval.statistics import Estimate

SCORE = "score"  # the unit of tasks that have one score per item; all others have one value per token
RIGHT = 0.5  # least score at which the full cache counts as right
TOLERANCE = 0.02  # relative difference up to which fast memory counts as the same
MORE, SAME, LESS = "more memory", "same memory", "less memory"
_MEMORY_KEYS = ("fast_ratio", "hot_ratio", "hit_rate", "guess_rate")

Row = dict[str, Any]


def aggregate(run: Run, cells: list[Cell]) -> list[Row]:
    """Return the rows of a run, in the order of its items and methods.

    Keys are the same in all rows; a value that does not apply is `None`.
    - `mean`: average over tokens for distributions, over items for scores.
    - `delta`: paired difference to the full cache on the same items.
    - `kept`: of the items (or their parts, or the answer tokens of `forced_answer`) that the full
      cache gets right, the share on which the method does as well. `kept_n` counts these.
    - `memory`: fast memory compared with plain `specache`, or with the run's first `specache`
      method.
    """
    table = _by_group_and_method(cells)
    full = full_label(run)
    ours = _reference(run)
    rows = []
    for group, methods in table.items():
        reference = methods.get(full or "", [])
        labels = [label for label in run.methods if label in methods]
        group_rows = [_row(run, group, label, methods[label], [] if label == full else reference) for label in labels]
        _compare_memory(group_rows, ours)
        rows += group_rows
    return rows


def _reference(run: Run) -> str | None:
    """Return the label of the method that others are compared with by memory, or `None`."""
    ours = [label for label, method in run.methods.items() if method["name"] == "specache"]
    return "specache" if "specache" in ours else next(iter(ours), None)


def full_label(run: Run) -> str | None:
    """Return the label of the full cache in a run, or `None`."""
    return next((label for label, method in run.methods.items() if method["name"] == "full"), None)


def is_score(run: Run) -> bool:
    """Return whether the run's values are scores of answers."""
    return run.unit == SCORE


def fast_memory(row: Row) -> float:
    """Return a method's fast memory, hot set included, as a share of the ordinary cache.

    Args:
        row: a row, or the `stats` of a cell.
    """
    return float(row["fast_ratio"] + row["hot_ratio"])


def _by_group_and_method(cells: list[Cell]) -> dict[str, dict[str, list[Cell]]]:
    table: dict[str, dict[str, list[Cell]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["index"]):
        if cell["values"]:
            table.setdefault(cell["group"], {}).setdefault(cell["method"], []).append(cell)
    return table


def _row(run: Run, group: str, label: str, cells: list[Cell], full: list[Cell]) -> Row:
    seed = int(run.identity["seed"])
    method = run.methods[label]
    series = [cell["values"] for cell in cells]
    row: Row = {
        "task": group,
        "method": label,
        "config": method["settings"],
        "unit": run.unit,
        "n": len(cells),
        "tokens": sum(map(len, series)),
    }
    estimates = _of_scores(cells, full, seed) if is_score(run) else _of_tokens(run, cells, full, seed)
    for name in ("mean", "p95", "p99", "top1", "ppl", "delta", "nll_delta", "kept"):
        row |= _figures(name, estimates.get(name))
    if is_score(run):
        row["kept_n"] = sum(map(len, _kept(cells, full))) if full else None
    else:
        row["kept_n"] = sum(map(len, _kept_tokens(cells))) or None
    row |= {key: _average([cell["stats"].get(key) for cell in cells]) for key in _MEMORY_KEYS}
    row["seconds"] = _average([cell["seconds"] for cell in cells])
    return row


def _figures(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """Return an estimate and its interval under the keys of a row. `ci95` is the mean's."""
    key = "ci95" if name == "mean" else f"{name}_ci95"
    if estimate is None:
        return {name: None, key: None}
    return {name: _finite(estimate.value), key: [_finite(bound) for bound in estimate.interval]}


def _of_scores(cells: list[Cell], full: list[Cell], seed: int) -> dict[str, Estimate]:
    scores = {cell["item"]: _score(cell) for cell in cells}
    reference = {cell["item"]: _score(cell) for cell in full}
    estimates = {"mean": statistics.score(list(scores.values()), seed=seed)}
    pairs = [(scores[item], reference[item]) for item in scores if item in reference]
    if pairs:
        estimates["delta"] = statistics.difference([mine - theirs for mine, theirs in pairs], seed=seed)
    if kept := _kept(cells, full):
        estimates["kept"] = _share(kept, seed)
    return estimates


def _kept(cells: list[Cell], full: list[Cell]) -> list[list[float]]:
    """Return, per item, whether the method does as well on each part that `full` gets right.

    An item whose answer has one score is one part. Items without such a part are left out.
    """
    reference = {cell["item"]: cell for cell in full}
    series = [kept_parts(cell, reference[cell["item"]]) for cell in cells if cell["item"] in reference]
    return [parts for parts in series if parts]


def kept_parts(cell: Cell, full: Cell) -> list[float]:
    """Return whether a method does as well on each part of an answer that `full` gets right."""
    pairs = zip(cell["values"], full["values"], strict=True)
    return [float(mine >= theirs - 1e-9) for mine, theirs in pairs if theirs >= RIGHT]


def _kept_tokens(cells: list[Cell]) -> list[list[float]]:
    """Return, per item, whether the method ranks each token first that the full cache does."""
    return [tokens for tokens in map(kept_tokens, cells) if tokens]


def kept_tokens(cell: Cell) -> list[float]:
    """Return whether a method ranks each token of an answer first that the full cache does."""
    pairs = zip(cell["tokens"].get("right", []), cell["tokens"].get("full_right", []), strict=True)
    return [right for right, full_right in pairs if full_right]


def _share(series: list[list[float]], seed: int) -> Estimate:
    """Estimate the share of ones: by Wilson, or by a bootstrap if items have several."""
    if all(len(values) == 1 for values in series):
        return statistics.wilson(sum(map(sum, series)), len(series))
    return statistics.agreement(series, seed=seed)


def _of_tokens(run: Run, cells: list[Cell], full: list[Cell], seed: int) -> dict[str, Estimate]:
    wanted = {"mean": statistics.mean, "p95": statistics.percentile(95), "p99": statistics.percentile(99)}
    estimates = statistics.bootstrap([cell["values"] for cell in cells], wanted, seed=seed)
    if all(cell["tokens"].get("top1") for cell in cells):
        estimates["top1"] = statistics.agreement([cell["tokens"]["top1"] for cell in cells], seed=seed)
    if all(cell["tokens"].get("nll") for cell in cells):
        series = [cell["tokens"]["nll"] for cell in cells]
        estimates |= statistics.bootstrap(series, {"ppl": statistics.perplexity}, seed=seed)
    if all(cell["tokens"].get("nll_delta") for cell in cells):
        series = [cell["tokens"]["nll_delta"] for cell in cells]
        estimates |= statistics.bootstrap(series, {"nll_delta": statistics.mean}, seed=seed)
    if kept := _kept_tokens(cells):
        estimates["kept"] = _share(kept, seed)
    if run.unit.startswith("NLL"):
        estimates |= _paired(cells, full, seed)
    return estimates


def _paired(cells: list[Cell], full: list[Cell], seed: int) -> dict[str, Estimate]:
    """Estimate the differences token by token, where the full cache saw the same tokens."""
    reference = {cell["item"]: cell["values"] for cell in full}
    differences = [
        [mine - theirs for mine, theirs in zip(cell["values"], reference[cell["item"]], strict=True)]
        for cell in cells
        if len(reference.get(cell["item"], ())) == len(cell["values"])
    ]
    return statistics.bootstrap(differences, {"delta": statistics.mean}, seed=seed) if differences else {}


def _compare_memory(rows: list[Row], ours: str | None) -> None:
    """Set `memory` in the rows of one group: more, less or the same as our method `ours`."""
    reference = next((fast_memory(row) for row in rows if row["method"] == ours), None)
    for row in rows:
        if not reference:
            row["memory"] = None
        elif fast_memory(row) > reference * (1 + TOLERANCE):
            row["memory"] = MORE
        else:
            row["memory"] = LESS if fast_memory(row) < reference * (1 - TOLERANCE) else SAME


def _score(cell: Cell) -> float:
    return sum(cell["values"]) / len(cell["values"])


def _average(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
