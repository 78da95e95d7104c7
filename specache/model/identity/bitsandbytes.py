"""The 4-bit weights of bitsandbytes in one form: a layer on a CPU packs its weight in another way when it first runs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def is_4_bit(tensor: Tensor) -> bool:
    """Whether this is a weight that bitsandbytes has quantised to 4 bits."""
    return type(tensor).__name__ == "Params4bit" and getattr(tensor, "quant_state", None) is not None


def unpacked_4_bit(tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the codes as they are stored in a checkpoint, and of the largest values of their blocks in bfloat16,
    to which packing rounds them.
    """
    state = tensor.quant_state
    functional = sys.modules["bitsandbytes.functional"]
    codes, largest = tensor.data, state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        blank = copy.copy(state)
        blank.original_nested = False  # the values of the blocks are not needed in their packed form
        codes, _ = functional._convert_weight_packed_for_cpu_inverse(codes, blank)
        largest = largest.T
    elif state.nested:
        largest = functional.dequantize_blockwise(largest, state.state2) + state.offset
    yield "", codes.reshape(-1)
    yield "absmax", largest.reshape(-1).to(torch.bfloat16)
    yield "code", state.code
