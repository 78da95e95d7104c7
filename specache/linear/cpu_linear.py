"""Linear layers with float weights on a CPU, faster than by PyTorch's own products.

- *Few rows.* A decode step reads every weight for one or two rows. `native_products` reads them at
  the speed of memory, whatever the dtype, and a row's result does not depend on those beside it.
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

from specache.linear import native_products
from specache.platform import extension, private_torch

MOST_FEW_ROWS = 8  # with more rows the weights are not what the product waits for
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
    few = native_products.instruction_set() is not None and weight.dtype in extension.DTYPES and weight.stride(-1) == 1
    if few:
        return _few_rows
    return _many_rows if widens(weight.dtype) else None


def _few_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """Multiply by our product if there are few rows, else as `_many_rows` does."""
    parameters: dict[str, Any] = layer._parameters  # attributes of a module are slow to look up
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None:  # it was parametrised since: peft does so inside a pass
        return linear(x, layer.weight, layer.bias)
    if x.dtype is not weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return linear(x, weight, bias)
    if native_products.calls_operators():
        out: Tensor = torch.ops.specache.linear(x, weight, bias)
        return out
    return _product(x, weight, bias)


def _many_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """Widen the weights if there are many rows, for a layer that only then is faster so."""
    weight = layer.weight
    compiling, autocast = torch.compiler.is_compiling(), torch.is_autocast_enabled("cpu")
    if _rows(x) <= MOST_FEW_ROWS or x.dtype is not weight.dtype or torch.is_grad_enabled() or compiling or autocast:
        return linear(x, weight, layer.bias)
    return _widened(x, weight, layer.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [..., K] times weight [N, K] -> [..., N], by the product for this number of rows."""
    rows = _rows(x)
    if 0 < rows <= MOST_FEW_ROWS and native_products.supports(x) and _fits(x, weight, bias):
        return native_products.plain_linear(x, weight, bias)
    return _widened(x, weight, bias) if rows > MOST_FEW_ROWS and widens(weight.dtype) else linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the extension, which checks nothing, may read these."""
    sound = x.shape[-1] == weight.shape[1] and weight.stride(1) == 1 and weight.is_cpu
    return sound and (bias is None or (bias.dtype is x.dtype and bias.stride(0) == 1))


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    wide = x.reshape(-1, x.shape[-1]).float()
    out = x.new_empty(len(wide), outputs)
    block = max(BLOCK_ELEMENTS // inputs, 1)
    for start in range(0, outputs, block):
        part = slice(start, start + block)
        out[:, part] = linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return out.reshape(*x.shape[:-1], -1)


def _rows(x: Tensor) -> int:
    """Return the number of rows of x [..., K]."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = torch.library.Library("specache", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", _product, "CPU")
torch.library.register_fake("specache::linear", _fake, lib=_library)
