"""How many prompt tokens are read between two decode steps, chosen once by measuring."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from specache.config import SpeCacheConfig
from specache.errors import FastMemoryError
from specache.platform.notices import warn_and_go_on

FIRST_RUNG = 32  # tokens; a smaller chunk reads the weights too often


def ladder(config: SpeCacheConfig) -> list[int]:
    """Return the chunks to choose from: powers of two, multiples of the group size.

    The largest is `prefill_chunk`, or next to it.
    """
    rungs, rung = [], max(FIRST_RUNG, config.group_size)
    while rung <= config.prefill_chunk:
        rungs.append(rung)
        rung *= 2
    return rungs or [config.prefill_chunk]


def choose_chunk(config: SpeCacheConfig, seconds: float, timer: AbstractContextManager[Callable[[int], float]]) -> int:
    """Return the largest rung of the ladder that is read within `seconds`; the lowest if none is.

    A coarse ladder gives the same chunk at every start on the same machine, and with it the same
    rounding.

    Args:
        timer: gives a function that reads a chunk of so many tokens and returns the seconds.
    """
    rungs = ladder(config)
    chosen = rungs[0]
    try:
        with timer as measure:
            measure(rungs[0])  # the first pass of a process also loads and allocates
            for rung in rungs:
                took = min(measure(rung), measure(rung))
                if took > seconds:
                    break
                chosen = rung
                if 1.5 * took > seconds:
                    break  # twice the tokens take nearly twice as long
    except FastMemoryError:
        pass  # a larger chunk does not fit
    except Exception as error:
        warn_and_go_on(f"A chunk of a prompt could not be timed, so {chosen} tokens are read at a time: {error!r}", stacklevel=2)
    return chosen
