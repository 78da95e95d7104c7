"""How many pairs a query selects, for tests."""

from __future__ import annotations

from hypothesis import strategies as st

from specache.config import TopK


@st.composite
def top_ks(draw: st.DrawFn, least: int = 1, most: int = 70, longest: int = 300) -> TopK:
    """One `k` for every length, or a larger one from some low-bit length on, up to `longest`."""
    short = draw(st.integers(least, most))
    if draw(st.booleans()):
        return TopK.always(short)
    return TopK(short, draw(st.integers(short, most)), draw(st.integers(0, longest)))
