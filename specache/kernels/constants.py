"""Tensors that are computed once and kept for the whole process: they must not depend on the modes of whoever asks first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

from torch import Tensor

from specache.platform import modes

P = ParamSpec("P")


def constant(most: int) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Keep the last `most` results of a function, each made in PyTorch's plain modes: no inference tensor, not on a default device
    of the caller's. The function names every dtype itself.
    """

    def decorate(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
        @lru_cache(maxsize=most)
        @wraps(make)
        def kept(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            with modes.ours():
                return make(*args, **kwargs)

        return kept  # type: ignore[return-value]

    return decorate
