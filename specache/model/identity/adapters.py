"""Find the active adapters of a model's layers and their scales.

They are peft's, also through transformers' `add_adapter`. An adapted layer names its dictionaries
by adapter (`adapter_layer_names`, `other_param_names`), the active adapters, and those merged into
the weights. Only these attributes are read, so peft need not be installed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from specache.errors import UsageError

Scales = tuple[tuple[str, Any], ...]  # (name, value) of numbers and strings, sorted by name
_PER_CALL_HOOKS = {
    "_adapter_names_pre_forward_hook": "adapter_names",
    "_alora_offsets_pre_forward_hook": "alora_offsets",
}


@dataclass(frozen=True)
class LayerAdapters:
    """The adapters of one layer.

    Attributes:
        active: name -> scales of the adapters whose product is added to the layer's; empty if they
            are disabled or merged.
        merged: names of the adapters that are merged into the layer's weights now.
    """

    active: dict[str, Scales]
    merged: tuple[str, ...]


def is_adapted(module: nn.Module) -> bool:
    """Return True if a module has adapters, or is replaced as a whole (`modules_to_save`)."""
    kind = type(module)
    return all(hasattr(kind, name) for name in ("adapter_layer_names", "active_adapters", "disable_adapters"))


def layer_adapters(module: Any) -> LayerAdapters:
    """Return the adapters of an adapted layer as they are now."""
    merged = tuple(module.merged_adapters)
    if merged or module.disable_adapters:
        return LayerAdapters({}, merged)
    here = {adapter for _, entries in _entries(module, module.adapter_layer_names) for adapter in entries}
    return LayerAdapters({name: _scales(module, name) for name in sorted(module.active_adapters) if name in here}, ())


def adapter_entries(module: Any) -> Iterator[tuple[str, str]]:
    """Yield (path below a layer, adapter) of the modules and tensors of its adapters."""
    for name, entries in _entries(module, (*module.adapter_layer_names, *module.other_param_names)):
        for adapter in entries:
            yield f"{name}.{adapter}", adapter


def refuse_adapters_per_call(model: Any) -> None:
    """Refuse adapters that are chosen per call, since rows are prefilled one by one.

    Raises:
        UsageError: the model has such adapters; the message names the argument.
    """
    for module in model.modules():
        if not is_adapted(module):
            continue
        variants = getattr(module, "lora_variant", {})
        if any("alora" in _kind(variants[name]).lower() for name in layer_adapters(module).active if name in variants):
            raise UsageError(
                "An active adapter is an activated LoRA (alora_invocation_tokens), which begins to count within a prompt. specache "
                "cannot follow that: use the model's stock generate(), or disable the adapter."
            )
        for hook in module._forward_pre_hooks.values():
            name = getattr(hook.func, "__name__", "") if isinstance(hook, functools.partial) else ""
            if name in _PER_CALL_HOOKS:
                _remove_hooks(model)
                raise UsageError(
                    f"{_PER_CALL_HOOKS[name]}= chooses adapters for one call, row by row, which specache cannot follow. Switch "
                    "with model.set_adapter(name) and generate for each adapter with a cache of its own."
                )


def _remove_hooks(model: Any) -> None:
    """Remove the hooks of a refused call: peft leaves them if an error ends its `generate`."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, functools.partial) and getattr(hook.func, "__name__", "") in _PER_CALL_HOOKS:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _scales(module: Any, adapter: str) -> Scales:
    found = {}
    for name, entries in _entries(module, module.other_param_names):
        one = entries[adapter] if isinstance(entries, dict) and adapter in entries else None
        if isinstance(one, bool | int | float | str):
            found[name] = one
    return tuple(sorted(found.items()))


def _entries(module: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield (name, container with one entry per adapter) of a layer's attributes.

    Names may have dots.
    """
    for name in names:
        value = module
        for part in name.split("."):
            value = getattr(value, part, None)
        if hasattr(value, "keys"):
            yield name, value


def _kind(variant: Any) -> str:
    return variant.__name__ if isinstance(variant, type) else type(variant).__name__
