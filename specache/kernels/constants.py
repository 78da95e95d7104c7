"""Constant tensors, computed once per process whatever PyTorch modes the first caller uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

from torch import Tensor

from specache.platform import modes

P = ParamSpec("P")


def constant(most: int) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorate a function to cache its last `most` results, computed in PyTorch's plain modes.

    So results are no inference tensors and ignore the caller's default device. The function must
    name every dtype.
    """

    def decorate(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
        @lru_cache(maxsize=most)
        @wraps(make)
        def kept(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            with modes.ours():
                return make(*args, **kwargs)

        return kept  # type: ignore[return-value]

    return decorate
