"""Benchmarks of a tiny layer."""

from __future__ import annotations

import pytest

from specache.bench import environment
from specache.bench.shapes import SHAPES
from tests.bench.tiny_shape import TINY


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a tiny shape, and measure the bandwidth over an array that is read at once."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(environment.LargeArray.__init__, "__defaults__", (1 << 20,))
