"""Adapters in a model's layers (peft's, also through transformers' `add_adapter`): which are active, and with which scales.

An adapted layer of peft says the names of its dictionaries by adapter (`adapter_layer_names`, `other_param_names`), which adapters
are active, and which are merged into the weights. That is all that is read here, so peft need not be installed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from specache.errors import UsageError

Scales = tuple[tuple[str, Any], ...]  # (name of a number or text, its value), by name
_PER_CALL_HOOKS = {
    "_adapter_names_pre_forward_hook": "adapter_names",
    "_alora_offsets_pre_forward_hook": "alora_offsets",
}


@dataclass(frozen=True)
class LayerAdapters:
    """The adapters of one layer.

    Attributes:
        active: name -> scales, of the adapters whose product is added to the layer's; none where they are disabled or merged.
        merged: names of the adapters that are part of the layer's weights now.
    """

    active: dict[str, Scales]
    merged: tuple[str, ...]


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer that adapters are added to, or that is exchanged as a whole (`modules_to_save`)."""
    kind = type(module)
    return all(hasattr(kind, name) for name in ("adapter_layer_names", "active_adapters", "disable_adapters"))


def layer_adapters(module: Any) -> LayerAdapters:
    """Return what an adapted layer adds to its base now."""
    merged = tuple(module.merged_adapters)
    if merged or module.disable_adapters:
        return LayerAdapters({}, merged)
    here = {adapter for _, entries in _entries(module, module.adapter_layer_names) for adapter in entries}
    return LayerAdapters({name: _scales(module, name) for name in sorted(module.active_adapters) if name in here}, ())


def adapter_entries(module: Any) -> Iterator[tuple[str, str]]:
    """Yield (path below a layer, adapter) of the modules and tensors that belong to one of its adapters."""
    for name, entries in _entries(module, (*module.adapter_layer_names, *module.other_param_names)):
        for adapter in entries:
            yield f"{name}.{adapter}", adapter


def refuse_adapters_per_call(model: Any) -> None:
    """Refuse adapters that are chosen by an argument of one call: rows are prefilled one by one here.

    Raises:
        UsageError: names the argument.
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
    """Remove the hooks of a call that is refused: peft leaves them where an error ends its `generate`."""
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
    """Yield (name, what has one entry per adapter) of a layer's attributes; the names may have dots."""
    for name in names:
        value = module
        for part in name.split("."):
            value = getattr(value, part, None)
        if hasattr(value, "keys"):
            yield name, value


def _kind(variant: Any) -> str:
    return variant.__name__ if isinstance(variant, type) else type(variant).__name__
