"""Read bitsandbytes' 4-bit weights in one form: on a CPU, the first run repacks them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def is_4_bit(tensor: Tensor) -> bool:
    """Return True if bitsandbytes has quantised this weight to 4 bits."""
    return type(tensor).__name__ == "Params4bit" and getattr(tensor, "quant_state", None) is not None


def unpacked_4_bit(tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the codes as in a checkpoint, and of the block maxima in bfloat16.

    Packing rounds the maxima to bfloat16.
    """
    state = tensor.quant_state
    functional = sys.modules["bitsandbytes.functional"]
    codes, largest = tensor.data, state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        blank = copy.copy(state)
        blank.original_nested = False  # the block maxima are not needed in packed form
        codes, _ = functional._convert_weight_packed_for_cpu_inverse(codes, blank)
        largest = largest.T
    elif state.nested:
        largest = functional.dequantize_blockwise(largest, state.state2) + state.offset
    yield "", codes.reshape(-1)
    yield "absmax", largest.reshape(-1).to(torch.bfloat16)
    yield "code", state.code
