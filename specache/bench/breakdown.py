"""Time the phases of a decode step (score, select, fetch, attend) while the whole model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from specache.bench.timing import PhaseClock
from specache.kernels import dispatch
from specache.kernels.cpu.native import LayerStep, NativeKernels
from specache.rows.fetch import HotSetRowFetcher, InPlaceRowFetcher

# The C++ kernels score and select in one call (`select`). Where rows are read in place, one call
# does the whole step (`in_place`).
PHASES = ("score", "select", "fetch", "attend", "in_place")
_KERNELS = {"score": "score", "select": "select", "rescore": "attend", "attend": "attend"}  # operation -> phase
_IN_A_LAYER = {"select": "select", "attend_low_bit": "attend", "attend_fetched": "attend"}
_FETCHING = ("begin_step", "start", "finish", "submit")  # methods of `RowFetcher`


@contextmanager
def recorded(clock: PhaseClock) -> Iterator[None]:
    """Let `clock` record the phases of every layer inside the block. This slows a step a little."""
    timed = [(dispatch, operation, phase) for operation, phase in _KERNELS.items()]
    timed.append((NativeKernels, "decode_in_place", "in_place"))  # type: ignore[arg-type]
    timed += [(LayerStep, method, phase) for method, phase in _IN_A_LAYER.items()]  # type: ignore[misc]
    timed += [(rows, method, "fetch") for rows in (InPlaceRowFetcher, HotSetRowFetcher) for method in _FETCHING]  # type: ignore[misc]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in timed]
    try:
        for owner, name, phase in timed:
            setattr(owner, name, _timed(getattr(owner, name), clock, phase))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _timed(function: Callable[..., Any], clock: PhaseClock, phase: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with clock(phase):
            return function(*args, **kwargs)

    return wrapper
