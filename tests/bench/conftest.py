"""Benchmarks of a tiny layer."""

from __future__ import annotations

import pytest

from specache.bench import plain_read
from specache.bench.shapes import SHAPES
from tests.bench.tiny_shape import TINY


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a tiny shape, and measure the bandwidth over an array that is read at once."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(plain_read.LargeArray.__init__, "__defaults__", (1 << 20,))
