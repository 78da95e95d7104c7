"""Weight-only quantisation on a CPU: a step reads all weights, so fewer bits save time.

PyTorch's own kernels multiply rows of activations by codes. torchao's tensors dequantise the whole
matrix in every step when run eagerly, which is slower than 16 bits. For many rows (a prompt's) the
matrix is dequantised once per pass here too.

Symbols: `N` outputs, `K` inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from specache.errors import ConfigError, UnsupportedModelError
from specache.linear.weight_format import WeightFormat
from specache.platform import modes, private_torch

GROUP = 32  # inputs that share a scale and a zero point at 4 bits
INT8_MANY_ROWS, INT4_MANY_ROWS = 48, 320  # from here on dequantising pays (measured with AVX-512)
INT8_INPUTS = 32  # the kernels read rows in steps of this many codes
INT4_OUTPUTS = 16


class Int8Linear(nn.Module):
    """A linear layer over int8 codes with one scale per output: W[n, k] = codes[n, k] * scales[n].

    Args:
        weight: [N, K], K a multiple of 32.
    """

    codes: Tensor  # int8 [N, K]
    scales: Tensor  # [N], in the weight's dtype
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scales = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
        self.register_buffer("codes", (weight / scales[:, None].float()).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return _multiplied(x, self.scales.dtype, self._product)

    def _product(self, rows: Tensor) -> Tensor:
        if rows.shape[0] < INT8_MANY_ROWS:
            out = private_torch.int8_product(rows, self.codes, self.scales)
        else:
            out = linear(rows, self.codes.to(rows.dtype)) * self.scales
        return _biased(out, self.bias)


class Int4Linear(nn.Module):
    """A linear layer over 4-bit codes in groups of 32 inputs: W = (code - 8) * scale + zero.

    Args:
        weight: [N, K], N a multiple of 16, K of 32.
    """

    packed: Tensor  # uint8 [N, K / 2], in a processor-dependent order
    scales_and_zeros: Tensor  # [K / 32, N, 2], in the weight's dtype
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        grouped = weight.float().unflatten(1, (-1, GROUP))  # [N, K / 32, 32]
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        scales = ((high - low) / 15).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
        zeros = (low + scales.float() * 8).to(weight.dtype)
        codes = ((grouped - zeros.float()) / scales.float() + 8).round().clamp(0, 15).to(torch.int32).flatten(1)
        packed, self._block = private_torch.pack_int4(codes)
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", torch.cat([scales, zeros], dim=-1).transpose(0, 1).contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return _multiplied(x, self.scales_and_zeros.dtype, self._product)

    def _product(self, rows: Tensor) -> Tensor:
        if rows.shape[0] < INT4_MANY_ROWS or self._block is None:
            out = private_torch.int4_product(rows, self.packed, self._block, GROUP, self.scales_and_zeros)
        else:
            out = linear(rows, private_torch.int4_matrix(self.packed, self._block, self.scales_and_zeros))
        return _biased(out, self.bias)


def quantise_weights(model: Any, weights: WeightFormat) -> None:
    """Replace the linear layers of a model on the CPU by quantised ones, in place.

    Embeddings stay as they are; a head tied to them gets codes of its own. Layers whose dimensions
    the kernels do not support stay as they are.

    Raises:
        ConfigError: the model is not on a CPU.
        UnsupportedModelError: most of its weights are not in linear layers (mixtures of experts).
    """
    if weights not in (WeightFormat.INT8, WeightFormat.INT4):
        return
    if model.device.type != "cpu":
        raise ConfigError(f"weights at {weights} are for the CPU, and the model is on {model.device}. Use --device cpu, or bf16.")
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and _fits(layer, weights)}
    _check_share(model, layers, weights)
    made = Int8Linear if weights is WeightFormat.INT8 else Int4Linear
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        bias = None if layer.bias is None else layer.bias.detach()
        setattr(model.get_submodule(parent), attribute, made(layer.weight.detach(), bias))


def quantised_bytes(module: Any, weights: WeightFormat) -> int | None:
    """Return the bytes of a quantised layer, or of a linear layer once `quantise_weights` has run.

    `None` for modules that it leaves as they are.
    """
    if isinstance(module, Int8Linear | Int4Linear):
        return sum(buffer.nbytes for buffer in module.buffers())
    if weights not in (WeightFormat.INT8, WeightFormat.INT4) or type(module) is not nn.Linear or not _fits(module, weights):
        return None
    outputs, inputs = module.weight.shape
    size = module.weight.itemsize
    bias = 0 if module.bias is None else module.bias.nbytes
    if weights is WeightFormat.INT8:
        return outputs * inputs + outputs * size + bias
    return outputs * inputs // 2 + inputs // GROUP * outputs * 2 * size + bias


def _fits(layer: nn.Linear, weights: WeightFormat) -> bool:
    if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
        return False  # quantised already (torchao)
    outputs, inputs = layer.weight.shape
    return inputs % INT8_INPUTS == 0 and (weights is WeightFormat.INT8 or outputs % INT4_OUTPUTS == 0)


def _check_share(model: Any, layers: dict[str, nn.Linear], weights: WeightFormat) -> None:
    embedding = model.get_input_embeddings().weight
    read = {id(p): p.numel() for p in model.parameters() if p is not embedding}
    quantised = sum(read.get(id(layer.weight), 0) for layer in layers.values())
    if 2 * quantised < sum(read.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps most of its weights outside linear layers whose size {weights} can take (experts, for "
            "example), so they would stay as they are. Leave out --weights."
        )


def _biased(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


def _multiplied(x: Tensor, dtype: torch.dtype, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `product` [M, K] -> [M, N] to the rows of x [..., K].

    Under `torch.autocast`, round inputs and result as it does for a linear layer.

    Args:
        dtype: the scales' dtype, in which the product is computed.
    """
    rows, rounded = x.reshape(-1, x.shape[-1]), modes.autocast_dtype(x)
    if rounded is None:
        out = product(rows)
    else:
        with torch.autocast(x.device.type, enabled=False):
            out = product(rows.to(rounded).to(dtype)).to(rounded)
    return out.reshape(*x.shape[:-1], -1)
