"""Time the phases of a decode step (score, select, fetch, attend) while the whole model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from specache.bench.timing import PhaseClock
from specache.engine.traced.layer_chain import LayerChain
from specache.kernels import dispatch
from specache.kernels.cpu.native import NativeLayerStep
from specache.kernels.torch.layer_step import TorchLayerStep
from specache.rows.fetch import HotSetRowFetcher, InPlaceRowFetcher

# A layer step scores when it begins. Where one call does everything (`in_place`), fetching rows is
# included.
PHASES = ("score", "select", "fetch", "attend", "in_place")
_KERNELS = {"layer_step": "score", "decode_in_place": "in_place", "decode_fetched": "in_place"}  # of `dispatch`: phase
_IN_A_LAYER = {
    "rescore": "attend",
    "select": "select",
    "select_next": "select",
    "attend_low_bit": "attend",
    "attend_fetched": "attend",
    "attend_hot": "attend",
}
CHAIN = LayerChain, "call"
_FETCHING = ("begin_step", "start", "finish", "finish_in_slots", "submit")  # methods of row fetchers


@contextmanager
def recorded(clock: PhaseClock) -> Iterator[None]:
    """Let `clock` record the phases of every layer inside the block. This slows a step a little."""
    timed: list[tuple[Any, str, str]] = [(dispatch, operation, phase) for operation, phase in _KERNELS.items()]
    timed += [(step, method, phase) for step in (NativeLayerStep, TorchLayerStep) for method, phase in _IN_A_LAYER.items()]
    timed += [(rows, method, "fetch") for rows in (InPlaceRowFetcher, HotSetRowFetcher) for method in _FETCHING]
    timed = [(owner, name, phase) for owner, name, phase in timed if hasattr(owner, name)]
    originals = [(owner, name, getattr(owner, name)) for owner, name in (*((owner, name) for owner, name, _ in timed), CHAIN)]
    try:
        for owner, name, phase in timed:
            setattr(owner, name, _timed(getattr(owner, name), clock, phase))
        setattr(*CHAIN, _timed_chain(LayerChain.call, clock))
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


def _timed_chain(call: Callable[..., Any], clock: PhaseClock) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(*args: Any) -> Any:
        outcome = call(*args)
        clock.add("in_place", outcome[3])  # C++ measures it
        return outcome

    return wrapper
