"""Quantise on a GPU: with Triton's kernels, or with PyTorch's where those are unsupported."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from specache.kernels import triton as triton_kernels
from specache.kernels.torch import operations as torch_ops
from specache.kernels.types import LowBitKV

_build_failures: dict[torch.device, str] = {}


def quantise(keys: Tensor, values: Tensor, low_bit_kv: LowBitKV, start: int) -> None:
    """Quantise tokens of keys and values [Hkv, n, D], see `specache.kernels.dispatch`.

    After the first error of compiling or loading a kernel, PyTorch quantises on that GPU. Such an
    error comes before the kernel runs, so PyTorch can start over. Other errors are raised.
    """
    if reason := _unsupported_reason(keys, low_bit_kv):
        _warn_unsupported(reason)
        torch_ops.quantise(keys, values, low_bit_kv, start)
        return
    try:
        triton_kernels.load().quantise(keys, values, low_bit_kv, start)
    except triton_kernels.build_errors() as error:
        _build_failures[keys.device] = f"a kernel cannot be built for {keys.device} ({triton_kernels.error_summary(error)})"
        quantise(keys, values, low_bit_kv, start)


def _unsupported_reason(keys: Tensor, low_bit_kv: LowBitKV) -> str | None:
    device = keys.device
    if reason := _build_failures.get(device) or (device.type == "cuda" and _missing(device)):
        return reason
    layer = low_bit_kv.head_dim, keys.dtype, low_bit_kv.group_size, low_bit_kv.code
    return triton_kernels.load().unsupported_reason(*layer)


@cache
def _missing(device: torch.device) -> str | None:
    return triton_kernels.unsupported_reason(device)


@cache
def _warn_unsupported(reason: str) -> None:
    warnings.warn(f"specache's Triton kernels do not serve this: {reason}. PyTorch does, slower.", RuntimeWarning, stacklevel=2)
