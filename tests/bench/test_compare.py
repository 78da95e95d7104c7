"""Implementations are interleaved where memory allows, run one by one where not, or skipped."""

from __future__ import annotations

from typing import Any

import pytest

from specache.bench import compare as comparison
from specache.bench.compare import Measured, Skipped, compare
from specache.bench.contenders import Contender
from tests.bench.tiny_shape import tiny_workload


class Fake(Contender):
    """Records its calls."""

    cache = "none"

    def __init__(self, impl: str, needed_bytes: int, log: list[str], fails: bool = False) -> None:
        self.impl, self.needed_bytes, self._log, self._fails = impl, needed_bytes, log, fails

    def prepare(self) -> None:
        self._log.append(f"prepare {self.impl}")

    def step(self) -> None:
        if self._fails:
            raise RuntimeError("out of order")
        self._log.append(f"step {self.impl}")

    def close(self) -> None:
        self._log.append(f"close {self.impl}")

    def phases(self, steps: int, before: Any = None) -> dict[str, float]:
        return {"score": float(steps)}


@pytest.fixture
def memory(monkeypatch):
    def free(size: int | None) -> None:
        monkeypatch.setattr(comparison, "memory", lambda: {"usable_bytes": size})

    return free


def test_implementations_that_fit_together_are_interleaved(memory):
    memory(None)
    log: list[str] = []
    a, b = Fake("a", 10**15, log), Fake("b", 10**15, log)
    outcome = compare(tiny_workload(), [a, b], 2, lambda text: None, phase_steps=3)
    assert log[:2] == ["prepare a", "prepare b"] and log[-2:] == ["close a", "close b"]
    assert log.count("step a") == log.count("step b") == 2 + comparison.WARMUP_STEPS
    assert all(isinstance(one, Measured) and one.interleaved and one.phases == {"score": 3.0} for one in outcome.values())


def test_implementations_that_fit_alone_run_alone_and_larger_ones_are_skipped(memory):
    memory(10**9)
    log: list[str] = []
    a, b, c = Fake("a", 6 * 10**8, log), Fake("b", 7 * 10**8, log), Fake("c", 5 * 10**9, log)
    outcome = compare(tiny_workload(), [c, a, b], 1, lambda text: None)
    assert log.index("close a") < log.index("prepare b")
    assert isinstance(outcome[a], Measured) and not outcome[a].interleaved and outcome[a].phases is None
    assert isinstance(outcome[c], Skipped) and "5.0 GB" in outcome[c].reason and "1.0 GB are free" in outcome[c].reason
    assert list(outcome) == [c, a, b] and "prepare c" not in log


def test_memory_is_freed_when_an_implementation_fails(memory):
    memory(None)
    log: list[str] = []
    with pytest.raises(RuntimeError, match="out of order"):
        compare(tiny_workload(), [Fake("a", 0, log), Fake("b", 0, log, fails=True)], 1, lambda text: None)
    assert log[-2:] == ["close a", "close b"]
