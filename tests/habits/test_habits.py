"""Any sequence of habits gets the stock cache's answers, or one of our errors. See `talk`.

`SPECACHE_HABITS=N` runs N random sequences instead of the 2,000 of the marker `habits`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.habits.talk import HABITS, User
from tests.sessions.sequences import gemma
from tests.tiny import llama

MODELS = {"llama": lambda: llama(num_hidden_layers=2), "hybrid": lambda: gemma(layers=2)}
SETTINGS: list[dict[str, Any]] = [
    {"policy": "on-demand"},
    {"policy": "verified", "slow_tier": "ram"},
    {"policy": "verified", "slow_tier": "disk"},
    {"policy": "speculative", "slow_tier": "ram"},
    {"policy": "previous", "slow_tier": "ram"},
    {"policy": "full"},
    {"code": "kivi", "policy": "on-demand"},
    {"code": "kivi", "policy": "verified", "slow_tier": "ram", "bits": 1},
]
NUMBER = st.integers(0, 10_000)
HABIT = st.sampled_from(sorted(HABITS)).flatmap(lambda name: st.tuples(st.just(name), *[NUMBER] * HABITS[name]))
SEQUENCE = st.lists(HABIT, min_size=2, max_size=7)
MANY = int(os.environ.get("SPECACHE_HABITS", "2000"))
CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}

_models: dict[str, Any] = {}


def live(name: str, chosen: dict[str, Any], habits: list[tuple[Any, ...]]) -> None:
    """Run one user's habits from a fresh model."""
    if name not in _models:
        _models[name] = MODELS[name]()
    with tempfile.TemporaryDirectory() as folder:
        where = {"slow_tier": f"disk:{folder}/rows"} if chosen.get("slow_tier") == "disk" else {}
        user = User(_models[name], {**chosen, **where}, Path(folder))
        try:
            for habit in habits:
                user.do(*habit)
        finally:
            user.close()


@pytest.mark.timeout(1800)
@settings(max_examples=150, derandomize=True, **CHECKS)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(SETTINGS), SEQUENCE)
def test_any_sequence_of_habits_answers_as_stock_or_is_refused(name, chosen, habits):
    live(name, chosen, habits)


@pytest.mark.habits
@pytest.mark.timeout(0)
@settings(max_examples=MANY, database=None, **CHECKS)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(SETTINGS), SEQUENCE)
def test_many_random_sequences_of_habits_answer_as_stock_or_are_refused(name, chosen, habits):
    live(name, chosen, habits)
