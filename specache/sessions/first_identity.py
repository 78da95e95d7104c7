"""The digests by which sessions of the first version identify their model.

They cover its configuration and 1,024 elements per tensor. They are computed only to open such a
session. The next save writes the present form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from specache.model.identity.offloaded_weights import FileTensor, kept_elsewhere
from specache.model.identity.samples import as_bits
from specache.model.identity.tensors import layers, weights
from specache.model.identity.wrappers import unwrapped

SAMPLED_ELEMENTS = 1024
_IRRELEVANT = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
}


def first_config_digest(model: Any) -> str:
    """Return the digest of a configuration, without its origin and settings of how it is run."""
    relevant = _relevant(unwrapped(model).config.to_dict())
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()


def first_weights_digests(model: Any) -> Iterator[str]:
    """Yield the possible digests of a model's weights: as saved, and without wrappers and
    adapters.
    """
    model = unwrapped(model)
    yield _digest(model, sorted(model.state_dict().items()))
    bare = (weight for weight in weights(list(layers(model)), model) if weight.persistent and weight.adapter is None)
    yield _digest(model, sorted((weight.name, weight.content) for weight in bare))


def _relevant(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _relevant(value) for key, value in config.items() if key not in _IRRELEVANT}
    return config


def _digest(model: Any, tensors: list[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_meta:
            parent, _, own = name.rpartition(".")
            tensor = kept_elsewhere(model.get_submodule(parent), own)
        if isinstance(tensor, Tensor | FileTensor):
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Tensor | FileTensor) -> bytes:
    count = torch.Size(tensor.shape).numel()
    if count == 0:
        return b""
    index = torch.linspace(0, count - 1, min(count, SAMPLED_ELEMENTS), dtype=torch.float64).long()
    if isinstance(tensor, FileTensor):
        return as_bits(tensor.runs(index.tolist(), 1)).numpy().tobytes()
    bits = as_bits(tensor)
    return bits.take(index.to(bits.device)).cpu().numpy().tobytes()
