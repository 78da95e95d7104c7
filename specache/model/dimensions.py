"""Read the dimensions of a model that its memory depends on, with or without weights.

`without_weights` makes a model on PyTorch's `meta` device, with modules and shapes but no numbers.
Symbols: `Hq` query heads, `Hkv` key-value heads, `D` head dimension, `e` bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specache.linear import cpu_linear
from specache.linear.weight_quant import PackedLinear, WeightFormat, quantised_bytes
from specache.model.identity.tensors import plain_tensors
from specache.model.identity.wrappers import unwrapped
from specache.model.info import ModelInfo, inspect_model
from specache.model.per_layer import attention_modules, head_dim, layer_settings, out_features

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # by model family


def row_bytes(heads: int, dim: int, itemsize: int) -> int:
    """Return the bytes of one token's `[K | V]`, for `heads` KV heads."""
    return 2 * heads * dim * itemsize


@dataclass(frozen=True)
class LayerDimensions:
    """One attention layer: `Hq`, `Hkv`, `D`, and the window in tokens (None: full attention)."""

    query_heads: int
    kv_heads: int
    head_dim: int
    window: int | None

    def row_bytes(self, itemsize: int) -> int:
        """Return the bytes of one token's `[K | V]`, for all KV heads."""
        return row_bytes(self.kv_heads, self.head_dim, itemsize)

    def kept(self, tokens: int) -> int:
        """Return how many of a sequence's tokens an ordinary cache keeps in this layer."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class ModelDimensions:
    """Dimensions of a model.

    Attributes:
        layers: attention layers in order.
        hidden: width of the residual stream, in elements.
        mlp: intermediate elements of the feed-forward layer per token (all active experts
            together).
        vocabulary: number of logits.
        itemsize: bytes of an activation and of a 16-bit element (`e`).
        softcap: True if attention scores are capped (Gemma 2), which PyTorch's fused attention does
            not support.
        device: `cpu` or `cuda`.
        max_positions: as in `ModelInfo`.
        rope_switch: prompts longer than this are prefilled in one chunk; or None.
        weight_bytes: bytes of all parameters and buffers.
        read_bytes: bytes of weights that a decode step of one token reads.
        matrix_elements: elements of the largest linear layer with packed weights (int8 or int4),
            else 0.
        dynamic_rope: RoPE frequencies change with every token past the switch.
        widens: products of 16-bit weights go through float32, block by block (`linear.cpu_linear`).
        joint_mlp: the feed-forward layer's first two products are one, whose result is held until
            the layer's end (Phi-3, GLM).
    """

    layers: tuple[LayerDimensions, ...]
    hidden: int
    mlp: int
    vocabulary: int
    itemsize: int
    softcap: bool
    device: str
    max_positions: int | None
    rope_switch: int | None
    weight_bytes: int
    read_bytes: int
    matrix_elements: int
    widens: bool = False
    joint_mlp: bool = False
    dynamic_rope: bool = False

    @property
    def full_layers(self) -> tuple[LayerDimensions, ...]:
        """Return the full-attention layers."""
        return tuple(layer for layer in self.layers if layer.window is None)

    @property
    def stored_row_bytes(self) -> int:
        """Return the bytes of one token's 16-bit keys and values in all full-attention layers."""
        return sum(layer.row_bytes(self.itemsize) for layer in self.full_layers)

    @property
    def sliding_layers(self) -> tuple[LayerDimensions, ...]:
        """Return the sliding-window layers."""
        return tuple(layer for layer in self.layers if layer.window is not None)


def without_weights(config: Any, dtype: torch.dtype) -> Any:
    """Return the model of a transformers configuration on the `meta` device.

    Nothing is loaded or computed.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def dimensions_of(
    model: Any, info: ModelInfo | None = None, device: str | None = None, weights: WeightFormat = WeightFormat.AUTO
) -> ModelDimensions:
    """Return the dimensions of a transformers model.

    Args:
        info: result of `inspect_model`, if available.
        device: device that the model will compute on; None is its current one.
        weights: format that its linear layers will have, for a model without weights.

    Raises:
        UnsupportedModelError: as `inspect_model`.
    """
    model = unwrapped(model)
    info = info or inspect_model(model)
    config = model.config.get_text_config(decoder=True)
    attention = {index: module for index, module in attention_modules(model) if head_dim(module)}
    layers = tuple(_layer(attention.get(i), layer_settings(config, i), window) for i, window in enumerate(info.windows))
    held, read, matrix = _weights(model, weights, _experts_used(layer_settings(config, 0)))
    return ModelDimensions(
        layers=layers,
        hidden=int(config.hidden_size),
        mlp=max(_mlp_width(layer_settings(config, i)) for i in range(len(layers))),
        vocabulary=int(config.vocab_size),
        itemsize=info.dtype.itemsize,
        softcap=bool(getattr(config, "attn_logit_softcapping", None)),
        device=device or info.device.type,
        max_positions=info.max_positions,
        rope_switch=info.rope_switch,
        dynamic_rope=info.rope_type == "dynamic",
        weight_bytes=held,
        read_bytes=read,
        matrix_elements=matrix,
        joint_mlp=any(out_features(getattr(module, "gate_up_proj", None)) for module in model.modules()),
        widens=(device or info.device.type) == "cpu" and cpu_linear.widens(info.dtype),
    )


def _layer(module: Any, config: Any, window: int | None) -> LayerDimensions:
    """Return a layer's dimensions from its key projection, else from the configuration.

    Under tensor parallelism a rank has fewer heads than the configuration says.
    """
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = head_dim(module) or getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(module, "num_key_value_groups", None) or heads // kv_heads
    projected = out_features(getattr(module, "k_proj", None))
    if projected is not None:
        kv_heads = projected // dim
    return LayerDimensions(int(kv_heads * groups), int(kv_heads), int(dim), window)


def _experts_used(config: Any) -> tuple[int, int]:
    """Return (active experts per token, experts) of a mixture of experts, else (1, 1)."""
    used = getattr(config, "num_experts_per_tok", None)
    experts = next((n for name in _EXPERT_COUNTS if (n := getattr(config, name, None))), None)
    return (int(used), int(experts)) if used and experts else (1, 1)


def _mlp_width(config: Any) -> int:
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = max(width) if isinstance(width, list | tuple) else width
    used, experts = _experts_used(config)
    if experts == 1:
        return int(width)
    return int(max(width, used * (getattr(config, "moe_intermediate_size", None) or width)))


def _weights(model: Any, weights: WeightFormat, experts: tuple[int, int]) -> tuple[int, int, int]:
    """Return (bytes held, bytes read per token, elements of the largest dequantised matrix)."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", head)
    head_reads_embedding = tied and quantised_bytes(head, weights) is None
    held, read, matrix, seen = 0, 0, 0, set()
    for name, module in model.named_modules():
        size = quantised_bytes(module, weights)
        if size is not None:
            held, read, matrix = held + size, read + size, max(matrix, _elements(module))
            continue
        for tensor in _own(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            size = sum(part.nbytes for _, part in plain_tensors(tensor))
            held += size
            if module is embedding and not head_reads_embedding:
                continue  # a token reads one row of it
            read += size * experts[0] // experts[1] if ".experts" in name else size
        packed = _packed_bytes(module)
        held, read = held + packed, read + packed
    return held, read, matrix


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _packed_bytes(module: Any) -> int:
    """Return the bytes of a PyTorch-quantised linear layer's matrix, which is not a parameter."""
    packed = module._modules.get("_packed_params")
    if packed is None or not hasattr(module, "out_features"):
        return 0
    size = 2 if getattr(packed, "dtype", None) is torch.float16 else 1
    return int(module.out_features * module.in_features * size)


def _elements(module: nn.Module) -> int:
    if isinstance(module, PackedLinear):
        return module.out_features * module.in_features
    assert isinstance(module, nn.Linear)
    return module.weight.numel()
