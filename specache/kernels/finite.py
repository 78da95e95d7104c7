"""Check a tensor for NaN and infinity, in one pass at the speed of a sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite.

    NaN and infinity propagate to the sum. If the sum is not finite, every element is checked,
    because a sum of finite numbers can overflow.
    """
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())
