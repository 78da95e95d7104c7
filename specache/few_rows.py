"""Linear layers over the few rows of a decode step, in float32 on a CPU.

PyTorch gives a product of one to three float32 rows with a weight matrix to a routine of MKL that uses one thread. With the
operands exchanged, `W x^T`, two columns and more are shared between threads: 19 ms instead of 46 for one row (taken twice) of
SmolLM2-135M's layers on two cores, and 19 instead of 76 for two. Where weights are bfloat16, PyTorch has no such gap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOST_ROWS = 8  # beyond it the ordinary product is as fast


def install(model: Any) -> list[nn.Linear]:
    """Have the model's float32 linear layers on the CPU multiply few rows the fast way -> the layers, for `remove`."""
    if not torch.backends.mkl.is_available():
        return []
    layers = [module for module in model.modules() if _gains(module)]
    for layer in layers:
        layer.forward = _forward_of(layer)
    return layers


def remove(layers: list[nn.Linear]) -> None:
    """Undo `install`."""
    for layer in layers:
        layer.__dict__.pop("forward", None)


def _gains(module: nn.Module) -> bool:
    """Exactly an ordinary linear layer, whose forward nobody else has replaced."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype is torch.float32 and weight.device.type == "cpu"


def _forward_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if not 0 < rows <= MOST_ROWS or x.dtype is not torch.float32 or torch.compiler.is_compiling():
            return nn.functional.linear(x, layer.weight, layer.bias)
        columns = x.reshape(rows, -1)
        if rows == 1:
            columns = columns.expand(2, -1)
        product = torch.mm(layer.weight, columns.T)[:, :rows].T.contiguous()  # [rows, out]; callers rely on the layout
        if layer.bias is not None:
            product = product + layer.bias
        return product.reshape(*x.shape[:-1], -1)

    return forward
