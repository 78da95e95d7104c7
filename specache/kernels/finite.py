"""Check tensors for NaN and infinity, in one pass at the speed of a sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specache.errors import NonFiniteError


def all_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite.

    NaN and infinity propagate to the sum. If the sum is not finite, every element is checked,
    because a sum of finite numbers can overflow.
    """
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def check_finite(keys: Tensor, values: Tensor, layer: int) -> None:
    """Reject NaN and infinity before anything is packed.

    Raises:
        NonFiniteError: names the layer.
    """
    for name, tensor in (("keys", keys), ("values", values)):
        if not all_finite(tensor):
            raise not_finite(layer, name)


def not_finite(layer: int, name: str = "keys or values") -> NonFiniteError:
    """Return the error that `check_finite` raises."""
    return NonFiniteError(
        f"The model produced NaN or infinity in the {name} of layer {layer}. Nothing of this step was kept. "
        "Check the weights, or run in a wider dtype (bfloat16 or float32 instead of float16)."
    )
