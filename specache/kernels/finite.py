"""Whether a tensor holds NaN or infinity, in one pass at the speed of a sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Both spread to a sum. A sum of finite numbers that overflows is looked at again, number by number."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())
