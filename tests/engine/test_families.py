"""Every causal-LM family of transformers equals its stock generate(), or is refused with a reason.

One family per attention code runs every time. `-m families` runs all of them, and vision-language
classes with text.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from tests.families import table
from tests.families.compare import families, refusal, try_family, vision_families

RECORDED = table.recorded()
SAME_VERSION = RECORDED["transformers"] == transformers.__version__
OUTCOMES = {(row["model_type"], row["model_class"]): row for row in RECORDED["causal"] + RECORDED["vision"]}


def representatives() -> list[Any]:
    """Return one supported family for each attention code."""
    first: dict[str, Any] = {}
    for row in RECORDED["causal"]:
        if row["result"] == "equal":
            first.setdefault(row["attention"], pytest.param(row["model_type"], row["model_class"], id=row["model_type"]))
    return list(first.values())


def refused() -> list[Any]:
    rows = [row for row in RECORDED["causal"] if row["result"] == "refused"]
    return [pytest.param(row["model_class"], row["reason"], id=row["model_type"]) for row in rows]


@pytest.mark.parametrize(("model_type", "model_class"), representatives())
def test_a_family_equals_stock_under_every_policy(model_type, model_class):
    outcome = try_family(model_type, model_class)
    assert outcome.result == "equal", outcome.reason


@pytest.mark.parametrize(("model_class", "reason"), refused())
def test_a_family_is_refused_with_the_reason(model_class, reason):
    assert refusal(model_class) == reason


@pytest.mark.families
@pytest.mark.parametrize(
    ("model_type", "model_class"), [pytest.param(*each, id=each[0]) for each in families() + vision_families()]
)
def test_every_family_equals_stock_or_is_refused(model_type, model_class):
    outcome = try_family(model_type, model_class)
    assert outcome.result in ("equal", "refused", "not tried"), outcome.reason
    recorded = OUTCOMES.get((model_type, model_class))
    if recorded is not None and SAME_VERSION:
        assert outcome.result == recorded["result"], outcome.reason


@pytest.mark.skipif(not SAME_VERSION, reason=f"the table is of transformers {RECORDED['transformers']}")
def test_every_family_of_the_installed_transformers_is_recorded():
    assert set(OUTCOMES) == set(families()) | set(vision_families())


def test_no_recorded_family_is_wrong_or_raises_another_error():
    assert {row["result"] for row in OUTCOMES.values()} <= {"equal", "refused", "not tried"}
    assert all(row["reason"] for row in OUTCOMES.values() if row["result"] != "equal")


def test_the_models_page_is_made_from_the_recorded_run():
    assert table.PAGE.read_text() == table.page(RECORDED), f"run {table.COMMAND}"
