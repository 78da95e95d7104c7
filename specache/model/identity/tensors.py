"""Enumerate the tensors of a model under names independent of wrappers and adapters.

Packed weights (bitsandbytes, torchao, quantised by PyTorch) are split into the plain tensors that
they consist of. Tensors of inactive adapters are omitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specache.model.identity.adapters import LayerAdapters, adapter_entries, is_adapted, layer_adapters
from specache.model.identity.offloaded_weights import FileTensor, hooks_of, kept_elsewhere

_AROUND = {"base_layer", "original_module", "_orig_mod", "_checkpoint_wrapped_module"}  # attributes that hold a wrapped layer
_PLAIN = {Tensor, nn.Parameter, nn.Buffer}
_INACTIVE = "an adapter that is not active\0"  # never the name of an adapter
_CHANGING_ROPE = ("dynamic", "longrope")  # frequencies follow the length of the last pass


@dataclass(frozen=True)
class PackedTensors:
    """An immutable object of PyTorch's quantised operators. Unpacking copies it."""

    packed: Any
    unpack: Any  # function that returns its tensors

    def tensors(self) -> list[Tensor]:
        """Return the tensors that it holds, as plain ones."""
        return [plain for tensor in self.unpack() if isinstance(tensor, Tensor) for _, plain in plain_tensors(tensor)]


@dataclass(frozen=True)
class Weight:
    """One tensor of a model.

    Attributes:
        name: path of its module, without wrappers, and its own name.
        content: where its elements are; a `Tensor` is a plain one.
        persistent: True if it is saved with the model. Others follow from the configuration.
        table: True for an embedding, whose rows are changed one by one.
        adapter: name of the adapter that it belongs to, or None.
        by_run: True if a run of the model may change it: a part of packed weights, which some
            layers pack when they first run, or a buffer that is not saved.
    """

    name: str
    content: Tensor | FileTensor | PackedTensors
    persistent: bool
    table: bool
    adapter: str | None
    by_run: bool


@dataclass(frozen=True)
class Layer:
    """A module as it computes now.

    Attributes:
        name: its path without wrappers.
        adapters: its adapters; None for a layer that cannot have any.
        owners: name of an own tensor -> the adapter that it belongs to (`_INACTIVE` for inactive
            ones).
        owner: the adapter that the whole module belongs to, or None.
    """

    name: str
    module: nn.Module
    adapters: LayerAdapters | None
    owners: dict[str, str]
    owner: str | None


def layers(model: nn.Module) -> Iterator[Layer]:
    """Yield every module that takes part once; of adapters, only the active ones."""
    yield from _layers("", "", model, None, set(), {})


def _layers(path: str, name: str, module: nn.Module, owner: str | None, seen: set[int], entries: dict[str, str]) -> Iterator[Layer]:
    """Yield a module and its submodules.

    Args:
        path: path of the module with all wrappers, ending with a dot.
        name: path without wrappers.
        owner: the adapter that the module belongs to.
        entries: path -> adapter or `_INACTIVE`, for modules and tensors of adapters. Adapted layers
            add theirs.
    """
    seen.add(id(module))
    adapters = layer_adapters(module) if is_adapted(module) else None
    if adapters is not None:
        for entry, adapter in adapter_entries(module):
            entries[path + entry] = adapter if adapter in adapters.active else _INACTIVE
    own: dict[str, str] = {}
    if entries:
        own = {key: entries[path + key] for key in (*module._parameters, *module._buffers) if path + key in entries}
    yield Layer(name, module, adapters, own, owner)
    for key, child in module._modules.items():
        below = entries.get(path + key, owner) if entries else owner
        if child is not None and id(child) not in seen and below != _INACTIVE:
            inner = name if key in _AROUND else f"{name}.{key}" if name else key
            yield from _layers(f"{path}{key}.", inner, child, below, seen, entries)


def weights(found: Sequence[Layer], model: Any) -> Iterator[Weight]:
    """Yield all tensors of a model's `layers`. A shared tensor is yielded once per name."""
    placing = [(layer.name, layer.module) for layer in found if _places_submodules(layer.module)]
    tables = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    for layer in found:
        if changes_with_length(layer.module):
            continue
        table = id(layer.module) in tables or isinstance(layer.module, nn.Embedding)
        for name, tensor, persistent in _own(layer.module):
            owner = layer.owners.get(name, layer.owner)
            if owner == _INACTIVE:
                continue
            full = f"{layer.name}.{name}" if layer.name else name
            content = _content(layer, name, tensor, placing) if tensor.is_meta else tensor
            if isinstance(content, Tensor):
                by_run = not persistent or type(content) not in _PLAIN
                for suffix, plain in plain_tensors(content):
                    yield Weight(full + suffix, plain, persistent, table, owner, by_run)
            else:
                yield Weight(full, content, persistent, table, owner, by_run=False)
        yield from _packed(layer, table)


def changes_with_length(module: nn.Module) -> bool:
    """Return True for a rotary embedding whose frequencies depend on the last pass.

    The configuration covers it.
    """
    kind = module.__dict__.get("rope_type")
    if kind is None:
        return False
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    return any(each in _CHANGING_ROPE for each in kinds)


def plain_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (suffix of the name, plain strided tensor) of all parts of a tensor."""
    if type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_quantized:
        yield "", tensor
    elif hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "__tensor_unflatten__"):  # a subclass that wraps other tensors
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            for suffix, plain in plain_tensors(getattr(tensor, name)):
                yield f".{name}{suffix}", plain
    elif tensor.is_quantized:
        yield ".codes", tensor.int_repr()
        per_channel = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        yield ".scale", tensor.q_per_channel_scales() if per_channel else torch.tensor(tensor.q_scale())
        yield ".zero_point", tensor.q_per_channel_zero_points() if per_channel else torch.tensor(tensor.q_zero_point())
    elif tensor.layout is torch.strided:
        yield "", tensor
        for name, part in _statistics(tensor):
            yield f".{name}", part
    else:
        yield "", tensor.to_dense()


def _statistics(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the statistics that bitsandbytes keeps in attributes of a packed parameter."""
    if type(tensor) in _PLAIN:
        return
    state = getattr(tensor, "quant_state", None)
    for owner, prefix in ((tensor, ""), (state, "quant_state."), (getattr(state, "state2", None), "quant_state.state2.")):
        for name in ("SCB", "absmax", "code", "offset"):
            value = getattr(owner, "__dict__", {}).get(name)
            if isinstance(value, Tensor):
                yield prefix + name, value


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, name not in module._non_persistent_buffers_set


def _content(layer: Layer, name: str, tensor: Tensor, placing: list[tuple[str, nn.Module]]) -> Tensor | FileTensor:
    """Return where the elements of a `meta` tensor are; the tensor itself if unknown."""
    found = kept_elsewhere(layer.module, name)
    if found is None:
        for above, module in placing:
            if _begins(layer.name, above):
                below = layer.name[len(above) :].lstrip(".")
                found = kept_elsewhere(module, f"{below}.{name}" if below else name)
    return tensor if found is None else found


def _places_submodules(module: nn.Module) -> bool:
    return any(getattr(hook, "place_submodules", False) for hook in hooks_of(module))


def _packed(layer: Layer, table: bool) -> Iterator[Weight]:
    """Yield the packed weights of `torch.ao` layers, and scales that bitsandbytes moved."""
    module: Any = layer.module
    packed = module.__dict__.get("_packed_params")
    if isinstance(packed, torch.ScriptObject):
        unpack = getattr(module, "_weight_bias", None) or getattr(module, "_weight", None)
        if unpack is not None:
            yield Weight(f"{layer.name}.packed", PackedTensors(packed, lambda: _as_tuple(unpack())), True, table, layer.owner, True)
    scales = getattr(module.__dict__.get("state"), "SCB", None)
    if isinstance(scales, Tensor):
        yield Weight(f"{layer.name}.weight.SCB", scales, True, table, layer.owner, True)


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def _begins(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.") or not above
