"""Find how large a generated document can be to fill a given number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_CLOSE_ENOUGH = 0.01  # share of the limit that may stay empty
_INTERPOLATIONS = 8  # sizes tried before the search falls back to halving


@dataclass(frozen=True)
class _Try:
    size: int
    tokens: int


def largest_that_fits(tokens: Callable[[int], int], limit: int, *, smallest: int, first: int) -> int | None:
    """Return a size whose tokens almost reach `limit`, or `None` if not even the smallest fits.

    Tokens are almost linear in the size, so each try is where the line through the known sizes
    reaches the limit.

    Args:
        tokens: size -> the tokens of a document of this size.
        smallest: the smallest size that can be made. It is tried if a larger one does not fit.
        first: the size that is tried first.
    """
    fits: _Try | None = None
    over: _Try | None = None
    size, tries = max(first, smallest), 0
    while fits is None or (limit - fits.tokens > _CLOSE_ENOUGH * limit and (over is None or over.size - fits.size > 1)):
        made, tries = _Try(size, tokens(size)), tries + 1
        if made.tokens <= limit:
            fits = made
        elif size > smallest:
            over = made
        else:
            return None
        size = max(smallest, _next_size(fits, over, limit, halve=tries > _INTERPOLATIONS))
    return fits.size


def _next_size(fits: _Try | None, over: _Try | None, limit: int, *, halve: bool) -> int:
    """Return the next size to try: between the two known ones, or beyond the only known one."""
    if fits and over:
        if halve:
            return (fits.size + over.size) // 2
        slope = (over.size - fits.size) / (over.tokens - fits.tokens)  # size per token
        return min(max(fits.size + int((limit - fits.tokens) * slope), fits.size + 1), over.size - 1)
    if fits:
        return fits.size + max(1, (limit - fits.tokens) * fits.size // fits.tokens)
    assert over is not None
    return min(over.size - 1, over.size * limit // over.tokens)
