"""Settings and attention modules layer by layer, for models with differing layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def layer_settings(config: Any, index: int) -> Any:
    """Return the configuration of layer `index`.

    A heterogeneous configuration raises if a setting that varies is read from the whole.
    """
    if getattr(config, "is_heterogeneous", False):
        return config.per_layer_config[index]
    return config


def attention_modules(model: Any) -> Iterator[tuple[int, Any]]:
    """Yield (layer, module) of a decoder's self-attention.

    These are modules with a layer index that project keys or state a head size.
    """
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and (head_dim(module) or getattr(module, "k_proj", None) is not None):
            yield index, module


def head_dim(module: Any) -> int:
    """Return the head dimension that a module states, or 0."""
    dim = getattr(module, "head_dim", None)
    return dim if isinstance(dim, int) else 0


def out_features(projection: Any) -> int | None:
    """Return a linear layer's number of outputs, from its matrix if it has one.

    A tensor-parallel rank has a part of the matrix. A packed weight (bitsandbytes) does not have
    the matrix's shape, and some layers have no tensor of that name.
    """
    weight = getattr(projection, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == getattr(projection, "in_features", None):
        return int(weight.shape[0])
    features = getattr(projection, "out_features", None)
    return features if isinstance(features, int) else None


def differing_dims(module: Any) -> tuple[int, int] | None:
    """Return (key, value) elements per head of an attention module if they differ, else None."""
    dim, value_dim = head_dim(module), getattr(module, "v_head_dim", None)
    if dim and isinstance(value_dim, int) and value_dim != dim:
        return dim, value_dim
    keys, values = out_features(getattr(module, "k_proj", None)), out_features(getattr(module, "v_proj", None))
    if dim and keys and values and keys != values:
        heads = keys // dim
        return dim, values // max(heads, 1)
    return None
