"""What decoder layers are, for comparing: what their code may depend on, apart from inputs and the
contents of weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from specache.engine import compiled_layers
from specache.platform import extension

PLAIN = (Tensor, nn.Parameter)
INTERNAL = frozenset((*nn.Module().__dict__, "forward"))  # attributes that are looked at in other ways
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
_COLLECTOR = "transformers.utils.output_capturing"  # its hooks stay after one call with output_hidden_states=True
_SETTINGS = frozenset((type(None), bool, int, float, str))


class SeenLayers:
    """Layers as they are when it is made: for a look in every step whether anything was replaced.

    Code of the caller runs between steps: streamers, logits processors, other threads.
    """

    def __init__(self, model: Any, decoder: list[nn.Module]) -> None:
        known = {id(layer) for layer in decoder}
        modules = [module for layer in decoder for module in modules_of(layer)]
        owners = [*modules, *(each for each in model.modules() if any(id(child) in known for child in each._modules.values()))]
        configs = {id(config): config for each in (model, *modules) if (config := each.__dict__.get("config")) is not None}
        self._mappings = [mapping for each in owners for mapping in (each.__dict__, each._modules, each._parameters, each._buffers)]
        self._mappings += [config.__dict__ for config in configs.values() if hasattr(config, "__dict__")]
        self._mappings += [hooks for each in modules for name in HOOKS if (hooks := each.__dict__.get(name)) is not None]
        self._sizes = [*map(len, self._mappings)]
        self._values = [*chain.from_iterable(map(dict.values, self._mappings))]
        self._tensors = [each for each in self._values if type(each) in PLAIN]
        self._places = [*map(Tensor.data_ptr, self._tensors)]
        self._forwards = [(kind, kind.forward) for kind in {type(each) for each in modules}]

    def are_unchanged(self) -> bool:
        """Return whether nothing was replaced since."""
        return (
            extension.native.hold(self._mappings, self._sizes, self._values)
            and [*map(Tensor.data_ptr, self._tensors)] == self._places
            and all(kind.forward is forward for kind, forward in self._forwards)
        )


def modules_of(layer: nn.Module) -> list[nn.Module]:
    """Return a layer and the modules inside it: `modules()` takes ten times as long."""
    found = [layer]
    for module in found:
        found += [each for each in module._modules.values() if each is not None]
    return found


def has_hooks(module: nn.Module, kinds: tuple[str, ...] = HOOKS) -> bool:
    """Return whether a module has hooks that may do something in a decode step.

    Those that collect outputs for transformers do not: a step asks for no outputs but logits.
    """
    attributes = module.__dict__
    return any(
        getattr(hook, "__module__", None) != _COLLECTOR
        for kind in kinds
        if (hooks := attributes.get(kind))
        for hook in tuple(hooks.values())
    )


def signature_of(modules: list[nn.Module]) -> Any:
    """Return what a layer's code may depend on, apart from inputs and the contents of weights."""
    return [
        (
            id(module),
            type(module),
            type(module).forward,
            _settings_of(module),
            _others_of(module),
            [has_hooks(module, (kind,)) for kind in HOOKS],
            _places_of(module._parameters),
            _places_of(module._buffers),
            _own_forward(module),
        )
        for module in modules
    ]


def structure_of(layer: nn.Module) -> Any:
    """Return what two layers have in common for which one recording can serve: all but weights."""
    found = []
    for module in modules_of(layer):
        settings = _settings_of(module)
        settings.pop("layer_idx", None)
        settings |= {
            name: repr(value) for name, value in module.__dict__.items() if type(value) in (list, tuple) and name[0] != "_"
        }
        names = tuple(name for owner in (module._parameters, module._buffers) for name, each in owner.items() if each is not None)
        found.append((type(module), type(module).forward, settings, _own_forward(module), names))
    return found


def place_of(tensor: Tensor) -> int | None:
    """Return where the memory of a tensor begins that a program can read, else `None`."""
    return tensor.untyped_storage().data_ptr() if type(tensor) in PLAIN and tensor.device.type != "meta" else None


def _places_of(tensors: Mapping[str, Tensor | None]) -> list[Any]:
    """Return where tensors lie; of a class that packs its numbers, which object it is."""
    return [
        (name, id(t) if t is None or type(t) not in PLAIN else (t.shape, t.stride(), t.dtype, t.data_ptr()))
        for name, t in tensors.items()
    ]


def configs_of(model: Any, layers: list[list[nn.Module]]) -> list[Any]:
    """Return the settings of all configurations that the layers can read."""
    modules = (module for layer in layers for module in layer)
    configs = {id(config): config for owner in (model, *modules) if (config := owner.__dict__.get("config")) is not None}
    return [
        (key, _settings_of(config), repr([value for value in config.__dict__.values() if type(value) in (list, tuple, dict)]))
        for key, config in configs.items()
        if hasattr(config, "__dict__")
    ]


def _others_of(module: nn.Module) -> list[Any]:
    """Return the other attributes that code may read: functions, lists, numbers of other types."""
    found = []
    for name, value in module.__dict__.items():
        kind = type(value)
        if name in INTERNAL or kind in _SETTINGS:
            continue
        plain = kind in (list, tuple, dict, set) or isinstance(value, int | float)
        found.append((name, kind, repr(value) if plain else id(value)))
    return found


def _settings_of(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in owner.__dict__.items() if type(value) in _SETTINGS}


def forwards_of(modules: list[nn.Module]) -> list[Any]:
    """Return which forwards the modules have."""
    return [(type(module), type(module).forward, _own_forward(module)) for module in modules]


def _own_forward(module: nn.Module) -> Any:
    """Return which forward was put on a module itself; a reference that does not keep it alive.

    It often refers to the model.
    """
    forward = module.__dict__.get("forward")
    if forward is None or compiled_layers.is_ours(forward):
        return None
    try:
        return weakref.ref(getattr(forward, "__func__", forward))
    except TypeError:
        return id(forward)
