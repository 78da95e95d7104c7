"""How large a document can be to fill a number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from specache.eval.tasks.fitting import largest_that_fits


@pytest.mark.parametrize("first", [1, 20, 5000])
@pytest.mark.parametrize("limit", [300, 4000, 131_072])
@pytest.mark.parametrize(
    "tokens",
    [
        lambda size: 120 + 7 * size,
        lambda size: 120 + 96 * size,
        lambda size: 100 + 500 * (size // 5),
        lambda size: 50 + round(9 * size**1.2),
        lambda size: 50 + round(40 * math.sqrt(size)),
    ],
)
def test_the_limit_is_almost_reached_in_few_tries(tokens: Callable[[int], int], limit: int, first: int) -> None:
    tried: list[int] = []

    def counted(size: int) -> int:
        tried.append(size)
        return tokens(size)

    size = largest_that_fits(counted, limit, smallest=1, first=first)
    assert size is not None and size in tried
    assert tokens(size) <= limit
    assert limit - tokens(size) <= 0.01 * limit or tokens(size + 1) > limit
    assert len(tried) == len(set(tried)) < 30


def test_nothing_fits_if_the_smallest_does_not() -> None:
    assert largest_that_fits(lambda size: 100 + size, 103, smallest=4, first=50) is None
    assert largest_that_fits(lambda size: 100 + size, 104, smallest=4, first=50) == 4
