"""Products of rows with a model's weights on a CPU, by the C++ extension (`csrc/product.cpp`).

Each weight is read once, for all rows. A row's result does not depend on the rows beside it. The
product with packed weights is also an operator (`torch.ops.specache`) for `torch.compile`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from specache.linear import packed_weights
from specache.linear.packed_weights import PackedWeights
from specache.platform import extension, private_torch
from specache.platform.step_threads import step_threads

MANY_ROWS = 64  # from here on bfloat16 products of a processor with matrix registers are faster
ROUNDED_ROWS = 512  # `kManyRows` of csrc/product.cpp: rows that are rounded at a time
VARIABLE = "SPECACHE_KERNELS"  # see `specache.kernels.dispatch`

_library = torch.library.Library("specache", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int outputs) -> Tensor")


class _Thread(threading.local):
    recorded = False


_thread = _Thread()


@contextmanager
def as_operators() -> Iterator[None]:
    """Have products call operators inside the block, in this thread, which a dispatch mode sees."""
    before, _thread.recorded = _thread.recorded, True
    try:
        yield
    finally:
        _thread.recorded = before


def calls_operators() -> bool:
    """Return whether a product is to be an operator's, because it is traced."""
    return _thread.recorded or torch.compiler.is_compiling()


@cache
def instruction_set() -> str | None:
    """Return the extension's instruction set that products use, or None without the extension.

    `SPECACHE_KERNELS` selects another one; with `torch`, products are PyTorch's.
    """
    there, wanted = extension.instruction_sets(), os.environ.get(VARIABLE)
    if wanted == "torch" or not there:
        return None
    return wanted if wanted in there else there[-1]


def supports(x: Tensor) -> bool:
    """Return whether the extension multiplies these rows: on the CPU, of its dtypes, not traced."""
    return x.is_cpu and type(x) is Tensor and x.dtype in extension.DTYPES and instruction_set() is not None


def packed_linear(x: Tensor, weights: PackedWeights, bias: Tensor | None) -> Tensor:
    """Return x [..., K] times packed weights -> [..., N] in x's dtype.

    Each row is rounded to 8 bits, with a scale per 32 inputs (as llama.cpp's Q8_0), and the blocks'
    integer sums are added in float32. Without the extension, and for many rows in bfloat16 on a
    processor with matrix registers (AMX), the matrix is formed from its codes, a part at a time,
    and rows are not rounded.

    Args:
        bias: [N] in x's dtype.

    Raises:
        RuntimeError: x has another number of inputs, or the bias another dtype.
    """
    if calls_operators():
        out: Tensor = torch.ops.specache.packed_linear(x, weights.codes, weights.scales, weights.zeros, bias, weights.outputs)
        return out
    if torch.is_grad_enabled() and x.requires_grad:
        return formed_linear(x, weights, bias)
    return _product(x, weights, bias)


def formed_linear(x: Tensor, weights: PackedWeights, bias: Tensor | None) -> Tensor:
    """Return the same product with rows that are not rounded, by PyTorch's operations."""
    parts, step = [], max(packed_weights.CODES_AT_ONCE // (packed_weights.TILE * weights.inputs), 1)
    for start in range(0, len(weights.codes), step):
        parts.append(linear(x, packed_weights.unpack(weights, x.dtype, start, start + step)))
    out = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))[..., : weights.outputs]
    return out.contiguous() if bias is None else out + bias


def _product(x: Tensor, weights: PackedWeights, bias: Tensor | None) -> Tensor:
    """Return the product that is the fastest for x: on a processor with matrix registers, that of
    many rows in bfloat16 is PyTorch's.
    """
    if x.dtype is torch.bfloat16 and x.numel() >= MANY_ROWS * weights.inputs and private_torch.has_matrix_registers():
        return formed_linear(x, weights, bias)
    return _packed(x, weights, bias) if supports(x) else formed_linear(x, weights, bias)


def _packed(x: Tensor, weights: PackedWeights, bias: Tensor | None) -> Tensor:
    x, outputs, zeros = x.contiguous(), weights.outputs, weights.zeros
    if x.shape[-1] != weights.inputs or (bias is not None and bias.dtype is not x.dtype):
        raise RuntimeError(
            f"A linear layer of {weights.inputs} inputs was called with {x.shape[-1]} in {x.dtype}, and a bias in "
            f"{None if bias is None else bias.dtype}."
        )
    out = x.new_empty(*x.shape[:-1], outputs)
    if rows := out.numel() // outputs:
        extension.native.packed_linear(
            instruction_set(),
            step_threads(),
            x.data_ptr(),
            extension.DTYPES[x.dtype],
            rows,
            x.shape[-1],
            outputs,
            weights.codes.data_ptr(),
            weights.scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
    return out


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [..., K] times weight [N, K] -> [..., N], all of one dtype, summed in float32.

    For a few rows of what `supports` allows: they share one read of the weights.

    Args:
        weight: its inputs are contiguous. bias: [N].
    """
    x, outputs, dtype = x.contiguous(), weight.shape[0], extension.DTYPES[x.dtype]
    out = x.new_empty(*x.shape[:-1], outputs)
    if rows := out.numel() // max(outputs, 1):
        extension.native.plain_linear(
            instruction_set(),
            step_threads(),
            x.data_ptr(),
            dtype,
            rows,
            x.shape[-1],
            outputs,
            weight.data_ptr(),
            dtype,
            weight.stride(0) * weight.itemsize,
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
    return out


def _packed_operator(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, outputs: int) -> Tensor:
    return _product(x, PackedWeights(codes, scales, zeros, outputs), bias)


def _packed_fake(x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


_library.impl("packed_linear", _packed_operator, "CPU")
torch.library.register_fake("specache::packed_linear", _packed_fake, lib=_library)
