"""Linear layers on a CPU, where PyTorch's own product is several times slower than it could be.

- *Few rows in float32.* PyTorch computes the product of one to three float32 rows with a weight
  matrix by a routine of MKL that uses one thread. With exchanged operands, `W x^T`, two or more
  columns are divided between threads: 19 ms instead of 46 for one row (computed twice) of
  SmolLM2-135M's layers on two cores, and 19 instead of 76 for two. bfloat16 has no such gap.
- *Many rows in 16 bits, on a processor without instructions for them.* There PyTorch multiplies
  element by element. With a block of the weights widened to float32 first, and the product rounded
  once at the end, 1,024 rows take 0.25 s instead of 1.6 for 8,192 outputs of 2,048 inputs (AVX2,
  two cores): as fast as float32 weights, in half their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from specache.platform import private_torch

MOST_FEW_ROWS = 8  # with more rows the ordinary product is as fast
FEWEST_MANY_ROWS = 12  # from this many rows on widening pays
BLOCK_ELEMENTS = 1 << 21  # weights widened at a time: 8 MB

Forward = Callable[[nn.Linear, Tensor], Tensor]


def install(model: Any) -> list[nn.Linear]:
    """Replace the forward of the model's linear layers on the CPU -> layers for `remove`."""
    changed = []
    for module in model.modules():
        forward = _forward(module)
        if forward is not None:
            module.forward = MethodType(forward, module)  # a deep copy of the model gets its own method
            changed.append(module)
    return changed


def remove(layers: list[nn.Linear]) -> None:
    """Undo `install`."""
    for layer in layers:
        layer.__dict__.pop("forward", None)


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Return whether PyTorch has fast products of this 16-bit type on this CPU."""
    return private_torch.multiplies_natively(dtype)


def widens(dtype: torch.dtype) -> bool:
    """Return whether products of many rows of this type go through float32 blocks on this CPU."""
    return dtype in (torch.bfloat16, torch.float16) and not multiplies_natively(dtype)


def _forward(module: nn.Module) -> Forward | None:
    """Return the replacement forward of a module.

    `None` unless it is a plain `nn.Linear` on the CPU whose forward has not been replaced.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return None
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return None
    if weight.dtype is torch.float32:
        return _few_rows if torch.backends.mkl.is_available() else None
    if widens(weight.dtype):
        return _many_rows
    return None


def _few_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    rows = _rows(x)
    if not 0 < rows <= MOST_FEW_ROWS or x.dtype is not torch.float32 or _is_left_to_pytorch():
        return linear(x, layer.weight, layer.bias)
    columns = x.reshape(rows, -1)
    if rows == 1:
        columns = columns.expand(2, -1)
    product = torch.mm(layer.weight, columns.T)[:, :rows].T.contiguous()  # [rows, out]; callers rely on it
    if layer.bias is not None:
        product = product + layer.bias
    return product.reshape(*x.shape[:-1], -1)


def _many_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    rows = _rows(x)
    if rows < FEWEST_MANY_ROWS or x.dtype is not weight.dtype or torch.is_grad_enabled() or _is_left_to_pytorch():
        return linear(x, weight, layer.bias)
    wide = x.reshape(rows, -1).float()
    out = x.new_empty(rows, layer.out_features)
    block = max(BLOCK_ELEMENTS // layer.in_features, 1)
    for start in range(0, layer.out_features, block):
        part = slice(start, start + block)
        bias = None if layer.bias is None else layer.bias[part].float()
        out[:, part] = linear(wide, weight[part].float(), bias)
    return out.reshape(*x.shape[:-1], -1)


def _is_left_to_pytorch() -> bool:
    """Return whether PyTorch must choose the product: compiling, or under `torch.autocast`."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


def _rows(x: Tensor) -> int:
    """Return the number of rows of x [..., K]."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0
