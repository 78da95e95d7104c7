"""The column `kept`: what counts as kept, of what, and how sure it is."""

from __future__ import annotations

from typing import Any

import pytest

from specache.eval.columns import columns
from specache.eval.results import Run
from specache.eval.statistics import wilson
from specache.eval.table_rows import Row, aggregate

METHODS = {name: {"name": name, "settings": {}} for name in ("full", "specache")}


def rows(unit: str, full: list[dict[str, Any]], ours: list[dict[str, Any]]) -> tuple[Row, Row]:
    """Return the rows of the full cache and of ours. Items are given by what was measured."""
    common = {"group": "g", "details": {}, "facts": {}, "seconds": 1.0, "tokens": {}}
    stats = {"fast_ratio": 1.0, "hot_ratio": 0.0, "hit_rate": None, "guess_rate": None}
    cells = [
        {**common, "item": str(index), "index": index, "method": method, "stats": stats, **measured}
        for method, items in (("full", full), ("specache", ours))
        for index, measured in enumerate(items)
    ]
    reference, mine = aggregate(Run({"task": "t", "seed": 0}, unit, METHODS), cells)
    return reference, mine


def scores(*items: list[float]) -> list[dict[str, Any]]:
    return [{"values": values} for values in items]


def forced(*items: tuple[list[float], list[float]]) -> list[dict[str, Any]]:
    return [{"values": [0.1] * len(full), "tokens": {"full_right": full, "right": mine}} for full, mine in items]


def test_items_with_one_score_are_counted_as_items() -> None:
    full, ours = rows("score", scores([1.0], [0.6], [0.4], [1.0]), scores([1.0], [0.5], [1.0], [1.0]))
    assert (full["kept"], full["kept_n"]) == (None, None)
    assert ours["kept_n"] == 3 and ours["kept_ci95"] == wilson(2, 3).interval


def test_parts_of_an_answer_are_counted_as_parts_and_averaged_per_item() -> None:
    """What the method finds and the full cache does not is not kept, whatever the item's score."""
    _, ours = rows("score", scores([1.0, 1.0, 0.0], [1.0]), scores([1.0, 0.0, 1.0], [1.0]))
    assert (ours["kept"], ours["kept_n"]) == (pytest.approx(2 / 3), 3)
    assert ours["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert ours["delta"] == 0.0


def test_parts_of_one_answer_are_not_independent() -> None:
    """Five answers in which all or nothing is kept are five observations, not fifty."""
    right = scores(*[[1.0] * 10] * 5)
    _, ours = rows("score", right, scores(*[[1.0] * 10] * 3, *[[0.0] * 10] * 2))
    independent = wilson(30, 50)
    low, high = ours["kept_ci95"]
    assert (ours["kept"], ours["kept_n"]) == (0.6, 50)
    assert high - low > 2 * (independent.high - independent.low)


def test_tokens_of_forced_answers_are_counted_in_every_row() -> None:
    full, ours = rows(
        "KL, nats",
        forced(([1, 0, 1, 1], [1, 0, 1, 1]), ([0, 0], [0, 0])),
        forced(([1, 0, 1, 1], [1, 1, 0, 1]), ([0, 0], [1, 0])),
    )
    assert (full["kept"], full["kept_n"], full["kept_ci95"]) == (1.0, 3, wilson(3, 3).interval)
    assert (ours["kept"], ours["kept_n"]) == (pytest.approx(2 / 3), 3)
    assert ours["kept_ci95"][0] < 2 / 3 < ours["kept_ci95"][1]
    assert {"kept", "of"} <= {column.title for column in columns([full, ours])}


def test_likelihoods_are_compared_with_the_full_caches() -> None:
    measured = [{"values": [0.1, 0.1], "tokens": {"nll": [2.0, 4.0], "nll_delta": [0.5, -0.1]}}] * 3
    _, ours = rows("KL, nats", measured, measured)
    assert ours["nll_delta"] == pytest.approx(0.2)
    assert ours["nll_delta_ci95"][0] < 0.2 < ours["nll_delta_ci95"][1]
    assert "NLL against full" in {column.title for column in columns([ours])}


def test_nothing_right_leaves_nothing_to_keep() -> None:
    _, ours = rows("KL, nats", forced(([0, 0], [0, 0])), forced(([0, 0], [0, 0])))
    assert (ours["kept"], ours["kept_ci95"], ours["kept_n"]) == (None, None, None)
    _, ours = rows("score", scores([0.0, 0.4]), scores([1.0, 1.0]))
    assert (ours["kept"], ours["kept_n"]) == (None, 0)
    _, ours = rows("KL, nats", [{"values": [0.1]}], [{"values": [0.1]}])
    assert (ours["kept"], ours["kept_n"]) == (None, None), "a task without forced answers"
