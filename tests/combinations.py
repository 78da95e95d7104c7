"""Parameters of tests that cross several axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def all_pairs(*axes: Sequence[Any]) -> list[Any]:
    """Return every combination of the axes' values, as parameters.

    Every run takes as many of them as it needs for every pair of values of two axes to occur. The
    others are marked `thorough`.
    """
    every = list(product(*axes))
    places = [tuple(axis.index(value) for axis, value in zip(axes, values, strict=True)) for values in every]
    pairs = [_pairs(place) for place in places]
    missing = set().union(*pairs)
    taken: set[int] = set()
    while missing:
        best = max(range(len(places)), key=lambda index: len(missing & pairs[index]))
        taken.add(best)
        missing -= pairs[best]
    return [pytest.param(*values, marks=[] if index in taken else pytest.mark.thorough) for index, values in enumerate(every)]


def _pairs(place: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(place), 2))
