"""Digests that identify a model's weights and active adapters, from samples of every tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from specache.model.identity.adapters import LayerAdapters
from specache.model.identity.bitsandbytes import is_4_bit, unpacked_4_bit
from specache.model.identity.offloaded_weights import FileTensor
from specache.model.identity.samples import file_runs, runs
from specache.model.identity.tensors import Weight, layers, weights
from specache.model.identity.wrappers import unwrapped

_Sampled = tuple[str, tuple[int, ...], str, bytes]  # name, shape, dtype, sample


def weights_digest(model: Any) -> str:
    """Return a digest of the weights without adapters.

    It covers name, shape, dtype and some runs of elements per saved tensor. Weights that lie in
    files are not read completely.
    """
    model = unwrapped(model)
    digest = hashlib.sha256()
    for weight in _by_name(model):
        if weight.adapter is None:
            for sampled in _sampled(weight):
                _add(digest, sampled)
    return digest.hexdigest()


def adapters_digest(model: Any) -> str:
    """Return the names of the active adapters with a digest of their scales and weights.

    Return "" if there are none.
    """
    model = unwrapped(model)
    found = list(layers(model))
    adapted = {layer.name: layer.adapters for layer in found if layer.adapters is not None and layer.adapters.active}
    if not adapted:
        return ""
    digest = hashlib.sha256()
    for name, adapters in sorted(adapted.items()):
        digest.update(f"{name}|{_scales(adapters)}|".encode())
    for weight in _by_name(model):
        if weight.adapter is not None:
            for sampled in _sampled(weight):
                _add(digest, sampled)
    names = sorted({name for adapters in adapted.values() for name in adapters.active})
    return f"{', '.join(names)}:{digest.hexdigest()}"


def _scales(adapters: LayerAdapters) -> str:
    return "; ".join(f"{name} {scales}" for name, scales in sorted(adapters.active.items()))


def _by_name(model: Any) -> list[Weight]:
    """Return all saved weights, except statistics of 4-bit ones (`unpacked_4_bit` yields them)."""
    saved = (one for one in weights(list(layers(model)), model) if one.persistent and ".quant_state." not in one.name)
    return sorted(saved, key=lambda weight: weight.name)


def _add(digest: Any, sampled: _Sampled) -> None:
    name, shape, dtype, sample = sampled
    digest.update(f"{name}|{shape}|{dtype.removeprefix('torch.')}|".encode())
    digest.update(sample)


def _sampled(weight: Weight) -> Iterator[_Sampled]:
    content = weight.content
    if isinstance(content, FileTensor):
        yield weight.name, content.shape, str(content.dtype), file_runs(content)
    elif isinstance(content, Tensor):
        for name, tensor in unpacked_4_bit(content) if is_4_bit(content) else [("", content)]:
            sample = b"" if tensor.is_meta else runs(tensor)
            yield f"{weight.name}.{name}" if name else weight.name, tuple(tensor.shape), str(tensor.dtype), sample
    else:
        for index, tensor in enumerate(content.tensors()):
            yield f"{weight.name}.{index}", tuple(tensor.shape), str(tensor.dtype), runs(tensor)
