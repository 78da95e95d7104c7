"""Weight-only quantisation on a CPU: a step reads all weights, so fewer bits save time.

`native_products` multiplies the codes with rows of activations.

Symbols: `N` outputs, `K` inputs of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specache.errors import ConfigError, UnsupportedModelError
from specache.linear import native_products, packed_weights
from specache.linear.packed_weights import PackedWeights
from specache.linear.weight_format import WeightFormat
from specache.platform import modes
from specache.platform.mapped_memory import Arena

_BITS = {WeightFormat.INT8: 8, WeightFormat.INT4: 4}


class PackedLinear(nn.Module):
    """A linear layer over packed codes (`specache.linear.packed_weights` says how they lie).

    Args:
        weight: [N, K] of a float type, K a multiple of 32.
        bias: [N], or None.
        arena: memory for the codes.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, arena: Arena | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = packed_weights.pack(weight, self.bits, arena)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype.

        Under `torch.autocast`, round inputs and result as it does for a linear layer.
        """
        if x.is_cpu and not torch.is_autocast_enabled("cpu"):
            return self._product(x)
        rounded = modes.autocast_dtype(x)
        if rounded is None:
            return self._product(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._product(x.to(rounded))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, bias={self.bias is not None}"

    def _product(self, x: Tensor) -> Tensor:
        buffers: dict[str, Any] = self._buffers  # attributes of a module are slow to look up
        weights = PackedWeights(buffers["codes"], buffers["scales"], buffers["zeros"], self.out_features)
        bias = buffers["bias"]
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        return native_products.packed_linear(x, weights, bias)


class Int8Linear(PackedLinear):
    """A linear layer over 8-bit codes: W = code * scale, one scale per output and 32 inputs."""

    bits = 8


class Int4Linear(PackedLinear):
    """A linear layer over 4-bit codes: W = (code - 8) * scale + zero, per output and 32 inputs."""

    bits = 4


def quantise_weights(model: Any, weights: WeightFormat) -> None:
    """Replace the linear layers of a model on the CPU by quantised ones, in place.

    Embeddings stay as they are; a head tied to them gets codes of its own. Layers whose number of
    inputs is no multiple of 32 stay as they are. A layer's float weights are freed before the next
    layer is quantised, unless something else refers to them.

    Raises:
        ConfigError: the model is not on a CPU.
        UnsupportedModelError: most of its weights are not in linear layers (mixtures of experts).
    """
    if weights not in _BITS:
        return
    if model.device.type != "cpu":
        raise ConfigError(f"weights at {weights} are for the CPU, and the model is on {model.device}. Use --device cpu, or bf16.")
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and _fits(layer)]
    _check_share(model, names, weights)
    made, arena = Int8Linear if weights is WeightFormat.INT8 else Int4Linear, Arena()  # a step reads layers in this order
    for name in names:
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = getattr(owner, attribute)
        quantised = made(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), arena)
        quantised.train(layer.training)
        setattr(owner, attribute, quantised)
        del layer  # before the next one is made


def quantised_bytes(module: Any, weights: WeightFormat) -> int | None:
    """Return the bytes of a quantised layer, or of a linear layer once `quantise_weights` has run.

    `None` for modules that it leaves as they are.
    """
    if isinstance(module, PackedLinear):
        return sum(buffer.nbytes for buffer in module.buffers())
    if weights not in _BITS or type(module) is not nn.Linear or not _fits(module):
        return None
    bias = 0 if module.bias is None else module.bias.nbytes
    outputs, inputs = module.weight.shape
    return packed_weights.packed_bytes(outputs, inputs, _BITS[weights]) + bias


def _fits(layer: nn.Linear) -> bool:
    """Return whether a layer can be packed. Weights quantised already (torchao) are not floats."""
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.is_floating_point() and packed_weights.fits(weight)


def _check_share(model: Any, names: list[str], weights: WeightFormat) -> None:
    embedding = model.get_input_embeddings().weight
    read = {id(p): p.numel() for p in model.parameters() if p is not embedding}
    quantised = sum(read.get(id(model.get_submodule(name).weight), 0) for name in names)
    if 2 * quantised < sum(read.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps most of its weights outside linear layers whose size {weights} can take (experts, for "
            "example), so they would stay as they are. Leave out --weights."
        )
