"""Compare two result folders of one task: what moved beyond its interval, and what only one has.

Methods are paired by their label, items by id, facts and length of the prompt. Where both folders
have the same items, differences are paired: a bootstrap resamples what both measured together.
Otherwise the two intervals are compared, which notices less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specache.errors import EvaluationError
from specache.eval import statistics
from specache.eval.results import WEIGHTS_DIGEST, Cell, Run, read_results
from specache.eval.statistics import Estimate, Values
from specache.eval.table_rows import SCORE, TOLERANCE, Row, aggregate, fast_memory, full_label, kept_parts, kept_tokens

PAIRED, INTERVALS = "paired", "intervals"
BETTER, WORSE, SAME = "better", "worse", "same"
ROUNDING = 1e-6  # differences below this are rounding, in nats or as a share
_DESCRIPTIVE = ("specache", "fingerprint", WEIGHTS_DIGEST)  # the version, and digests of the model
_FIGURES = {"mean": "ci95", "p99": "p99_ci95", "kept": "kept_ci95"}


@dataclass(frozen=True)
class Change:
    """One figure of one method in both folders.

    Attributes:
        task: group of items.
        figure: `mean`, `p99`, `kept` (a share), or `memory` (fast and hot together, over the
            ordinary cache).
        before, after: its value in the first and in the second folder. Paired ones, and memory, are
            over the items that both have, if there are any.
        difference: `after` less `before`.
        ci95: 95% interval of the difference; None if it is not paired.
        basis: `paired` or `intervals`.
        items: number of items: those that both have, or the fewer of the two.
        verdict: `better` or `worse` if it moved beyond its interval, else `same`.
    """

    task: str
    method: str
    figure: str
    before: float
    after: float
    difference: float
    ci95: list[float] | None
    basis: str
    items: int
    verdict: str

    @property
    def moved(self) -> bool:
        """Return whether it moved beyond its interval."""
        return self.verdict != SAME


@dataclass(frozen=True)
class Comparison:
    """The comparison of two folders.

    Attributes:
        changes: every figure that both have.
        only_before, only_after: (task, method) of rows that only one folder has.
        notes: settings that differ, of the run and of methods with the same label.
    """

    unit: str
    changes: list[Change]
    only_before: list[tuple[str, str]]
    only_after: list[tuple[str, str]]
    notes: list[str]

    @property
    def moved(self) -> list[Change]:
        """Return the changes beyond their intervals."""
        return [change for change in self.changes if change.moved]

    @property
    def worse(self) -> list[Change]:
        """Return the changes for the worse."""
        return [change for change in self.changes if change.verdict == WORSE]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        rows = [{"task": task, "method": method} for task, method in self.only_before]
        more = [{"task": task, "method": method} for task, method in self.only_after]
        changes = [asdict(change) for change in self.changes]
        return {"unit": self.unit, "changes": changes, "only_before": rows, "only_after": more, "notes": self.notes}


def compare_runs(before: Path, after: Path, ignore: Iterable[str] = ()) -> Comparison:
    """Compare the finished cells of two folders.

    Args:
        ignore: what may differ between the runs: a setting of the task (`lengths`), or `model`,
            `dtype`, `weights`, `seed`, `system`.

    Raises:
        EvaluationError: a folder holds no finished cells; the tasks or the units differ; or a
            setting differs that is not in `ignore`.
    """
    (first, cells), (second, others) = _read(before), _read(after)
    notes = _check_comparable(before, after, first, second, set(ignore)) + _method_notes(first, second)
    kept = _KeptPairs(first, second, cells, others)
    old = {(row["task"], row["method"]): row for row in aggregate(first, cells)}
    new = {(row["task"], row["method"]): row for row in aggregate(second, others)}
    measured, measured_too = _by_row(cells), _by_row(others)
    seed = int(first.identity.get("seed", 0))
    changes: list[Change] = []
    for key in (key for key in old if key in new):
        changes += _changes(first.unit, old[key], new[key], measured[key], measured_too[key], kept, seed)
    return Comparison(first.unit, changes, [key for key in old if key not in new], [key for key in new if key not in old], notes)


def _read(folder: Path) -> tuple[Run, list[Cell]]:
    run, cells = read_results(folder)
    cells = [cell for cell in cells if cell["values"]]
    if not cells:
        raise EvaluationError(f"{folder} holds no finished cells yet.")
    return run, cells


def _check_comparable(first: Path, second: Path, before: Run, after: Run, ignore: set[str]) -> list[str]:
    """Return notes on what differs and may. Raise `EvaluationError` if something else does."""
    if before.task != after.task or before.unit != after.unit:
        raise EvaluationError(
            f"{first} holds results of {before.task!r} in {before.unit}, {second} of {after.task!r} in {after.unit}. "
            "Compare folders of the same task."
        )
    here, there = _settings(before), _settings(after)
    if unknown := ignore - here.keys() - there.keys():
        raise EvaluationError(
            f"--ignore {', '.join(sorted(unknown))}: these runs have no such setting. They have {', '.join(here)}."
        )
    differing = {key: (here.get(key), there.get(key)) for key in {**here, **there} if here.get(key) != there.get(key)}
    described = {key: f"{key} is {_brief(old)} in {first} and {_brief(new)} in {second}" for key, (old, new) in differing.items()}
    refused = [key for key in differing if key not in ignore and key in here and key in there]
    if refused:
        raise EvaluationError(
            f"these runs have different settings: {'; '.join(described[key] for key in refused)}. "
            f"Compare them all the same with --ignore {','.join(refused)}."
        )
    return list(described.values())


def _settings(run: Run) -> dict[str, Any]:
    identity = {key: value for key, value in run.identity.items() if key not in (*_DESCRIPTIVE, "settings", "task")}
    identity["model"] = Path(str(identity["model"])).name
    optional = {"weights": None, "system": None, "chat_template_kwargs": None}
    return {**run.identity["settings"], **optional, **identity}


def _method_notes(before: Run, after: Run) -> list[str]:
    notes = []
    for label, method in before.methods.items():
        old, new = method["settings"], after.methods.get(label, method)["settings"]
        changed = [
            f"{key} {_brief(old.get(key))} -> {_brief(new.get(key))}" for key in {**old, **new} if old.get(key) != new.get(key)
        ]
        if changed:
            notes.append(f"{label} has other defaults: {', '.join(changed)}")
    return notes


def _by_row(cells: list[Cell]) -> dict[tuple[str, str], dict[str, Cell]]:
    grouped: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell["group"], cell["method"]), {})[cell["item"]] = cell
    return grouped


class _KeptPairs:
    """What a method keeps of the same answers in two runs.

    Args:
        before, after: the runs.
        cells, others: their cells.
    """

    def __init__(self, before: Run, after: Run, cells: list[Cell], others: list[Cell]) -> None:
        self._of_scores = before.unit == SCORE
        self._full = [_of_method(full_label(run), of_run) for run, of_run in ((before, cells), (after, others))]

    def change(self, pairs: list[tuple[Cell, Cell]], seed: int) -> tuple[float, float, Estimate] | None:
        """Return the shares kept before and after, and their difference with its interval.

        It is `None` unless the full cache gets the same number of parts of each answer right in
        both runs.
        """
        old, new = (
            [self._parts(cell, full) for cell in cells] for cells, full in zip(zip(*pairs, strict=True), self._full, strict=True)
        )
        if list(map(len, old)) != list(map(len, new)) or not any(old):
            return None
        series = [[then - now for now, then in zip(*parts, strict=True)] for parts in zip(old, new, strict=True) if parts[0]]
        together = np.concatenate(series)
        if np.ptp(together) == 0:
            estimate = statistics.difference(together.tolist(), seed=seed)
        else:
            estimate = statistics.bootstrap(series, {"kept": statistics.mean}, seed=seed)["kept"]
        before, after = (float(np.concatenate(parts).mean()) for parts in (old, new))
        return before, after, estimate

    def _parts(self, cell: Cell, full: dict[str, Cell]) -> list[float]:
        if not self._of_scores:
            return kept_tokens(cell)
        return kept_parts(cell, full[cell["item"]]) if cell["item"] in full else []


def _of_method(label: str | None, cells: list[Cell]) -> dict[str, Cell]:
    return {cell["item"]: cell for cell in cells if cell["method"] == label}


def _changes(
    unit: str, before: Row, after: Row, cells: dict[str, Cell], others: dict[str, Cell], kept: _KeptPairs, seed: int
) -> list[Change]:
    """Return the changes of one row: mean, p99 and kept where it has them, and memory."""
    pairs = [(cell, others[item]) for item, cell in cells.items() if item in others and _same_item(cell, others[item])]
    found = _paired(unit, pairs, seed)
    if pairs and None not in (before["kept"], after["kept"]) and (of_kept := kept.change(pairs, seed)) is not None:
        found["kept"] = of_kept
    fewer = min(before["n"], after["n"])

    def change(figure: str, old: float, new: float, interval: list[float] | None, verdict: str) -> Change:
        basis, items = (PAIRED if interval is not None else INTERVALS), fewer
        if pairs and (basis == PAIRED or figure == "memory"):
            items = len(pairs)
        return Change(before["task"], before["method"], figure, old, new, new - old, interval, basis, items, verdict)

    changes = []
    for figure, key in _FIGURES.items():
        better = 1 if unit == SCORE or figure == "kept" else -1
        if figure in found:
            old, new, estimate = found[figure]
            verdict = _verdict(better, estimate.value, estimate.low, estimate.high)
            changes.append(change(figure, old, new, estimate.interval, verdict))
        elif before[figure] is not None and after[figure] is not None:
            old, new = before[figure], after[figure]
            verdict = _verdict(better, new - old) if _apart(before[key], after[key]) else SAME
            changes.append(change(figure, old, new, None, verdict))
    old, new = fast_memory(before), fast_memory(after)
    if pairs:  # of other lengths, a method holds other shares
        old, new = (_mean([fast_memory(cell["stats"]) for cell in same]) for same in zip(*pairs, strict=True))
    verdict = _verdict(-1, new - old) if abs(new - old) > TOLERANCE * old else SAME
    return [*changes, change("memory", old, new, None, verdict)]


def _same_item(one: Cell, other: Cell) -> bool:
    lengths = one.get("prompt_tokens"), other.get("prompt_tokens")
    return one["facts"] == other["facts"] and (None in lengths or lengths[0] == lengths[1])


def _paired(unit: str, pairs: list[tuple[Cell, Cell]], seed: int) -> dict[str, tuple[float, float, Estimate]]:
    """Return figure -> value before, value after, difference with its interval.

    It is empty where no paired interval can be given: without common items, and for one item whose
    tokens do not correspond.
    """
    if not pairs:
        return {}
    if unit != SCORE and all(len(one["values"]) == len(other["values"]) for one, other in pairs):
        return _of_tokens(pairs, seed)
    means = [(_mean(one["values"]), _mean(other["values"])) for one, other in pairs]
    differences = [new - old for old, new in means]
    if unit == SCORE:
        estimate = statistics.difference(differences, seed=seed)
    elif len(pairs) > 1:
        estimate = statistics.bootstrap([[one] for one in differences], {"mean": statistics.mean}, seed=seed)["mean"]
    else:
        return {}
    return {"mean": (_mean([old for old, _ in means]), _mean([new for _, new in means]), estimate)}


def _of_tokens(pairs: list[tuple[Cell, Cell]], seed: int) -> dict[str, tuple[float, float, Estimate]]:
    """Resample the places of tokens, so that both runs are drawn together."""
    old = np.concatenate([one["values"] for one, _ in pairs])
    new = np.concatenate([other["values"] for _, other in pairs])
    ends = np.cumsum([len(one["values"]) for one, _ in pairs])
    places = [list(range(end - len(one["values"]), end)) for (one, _), end in zip(pairs, ends, strict=True)]
    wanted = {"mean": statistics.mean, "p99": statistics.percentile(99)}

    def difference(statistic: statistics.Statistic) -> statistics.Statistic:
        def of_places(samples: Values) -> Values:
            drawn = samples.astype(np.int64)
            return statistic(new[drawn]) - statistic(old[drawn])

        return of_places

    estimates = statistics.bootstrap(places, {name: difference(one) for name, one in wanted.items()}, seed=seed)
    return {name: (float(one(old[None])[0]), float(one(new[None])[0]), estimates[name]) for name, one in wanted.items()}


def _verdict(better: int, value: float, low: float | None = None, high: float | None = None) -> str:
    """Return the verdict on a difference, with its interval if it has one.

    Args:
        better: 1 if more is better, else -1.
    """
    if abs(value) < ROUNDING or (low is not None and high is not None and low <= 0 <= high):
        return SAME
    return BETTER if math.copysign(1, value) == better else WORSE


def _apart(one: list[float | None], other: list[float | None]) -> bool:
    """Return whether two intervals do not touch."""
    if None in (*one, *other):
        return False
    (low, high), (low_too, high_too) = one, other
    return bool(high < low_too or high_too < low)  # type: ignore[operator]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
