"""A model's decoder layers as programs (`program`), recorded when a shape of step first comes.

A decode step of an eager layer is many small operations, which Python hands to PyTorch one by one:
on two cores that takes several times as long as reading the weights. A program takes two calls per
layer, and a chain of them (`layer_chain`) one call per step. They are recorded from the model's own
code, so no model is written down here a second time.

What a program would not notice stays eager: layers with hooks or forwards of somebody else's,
modules from outside of PyTorch, transformers and this package, other modes of PyTorch. Whether a
layer still is what was recorded is looked at before every answer: modules, settings, hooks, and
where the weights lie.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specache.engine import compiled_layers
from specache.engine.traced.call_shape import HIDDEN
from specache.engine.traced.layer_chain import LayerChain, Trail, has_hooks
from specache.engine.traced.layer_operations import Unrecordable
from specache.engine.traced.program import Program
from specache.linear import native_products
from specache.linear.cpu_linear import MOST_FEW_ROWS
from specache.platform import forks, modes, private_torch

OURS = ("torch.nn.", "transformers.", "specache.")  # where modules come from whose code we record
_SETTINGS = frozenset((type(None), bool, int, float, str))
PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_models: weakref.WeakKeyDictionary[Any, TracedLayers] = weakref.WeakKeyDictionary()
_lock = forks.lock()


class TracedLayers:
    """The programs of one model's decoder layers. It holds no reference to the model.

    Attributes:
        reasons: why layers are not recorded, by number.
    """

    def __init__(self, model: Any) -> None:
        self._layers = {id(layer): (number, weakref.ref(layer)) for number, layer in compiled_layers.decoder_layers(model)}
        self._callers = [weakref.ref(module) for module in _callers_of(model)]
        self._programs: dict[tuple[int, torch.Size], Program | None] = {}
        self._structures: list[tuple[Any, Program]] = []  # of layers that were recorded, and their programs
        self._chains: dict[torch.Size, LayerChain | None] = {}
        self._signature: Any = None
        self.reasons: dict[int, str] = {}

    def refresh(self, model: Any) -> list[Tensor] | None:
        """Drop the programs if a layer is no longer what was recorded.

        Returns:
            the layers' weights, or `None` if no layer can be recorded.
        """
        layers = [(number, layer) for number, ref in self._layers.values() if (layer := ref()) is not None]
        modules = [_modules_of(layer) for _, layer in layers]
        callers = [module for ref in self._callers if (module := ref()) is not None]
        signature = [_signature(each) for each in modules], _configs_of(model, modules), _code_of(callers)
        if signature != self._signature:
            self._signature = signature
            self._programs.clear()
            self._structures.clear()
            self._chains.clear()
            self.reasons = {number: reason for number, layer in layers if (reason := _foreign(layer)) is not None}
        if len(self.reasons) == len(layers):
            return None
        found = (module for each in modules for module in each)
        weights = (weight for module in found for weight in (*module._parameters.values(), *module._buffers.values()))
        return [weight.detach() for weight in weights if weight is not None]

    def number(self, layer: Any) -> int | None:
        """Return a layer's number, or `None` if it is not one of the model's."""
        number, ref = self._layers.get(id(layer), (None, None))
        return number if ref is not None and ref() is layer else None

    @property
    def numbers(self) -> list[int]:
        """The numbers of all layers, in their order."""
        return [number for number, _ in self._layers.values()]

    def chain(self, shape: torch.Size) -> LayerChain | None:
        """Return the chain for hidden states of a shape, if there is one."""
        return self._chains.get(shape)

    def trail(self, shape: torch.Size) -> Trail | None:
        """Return what notes whether the layers are a chain, `None` where that is known."""
        return None if shape in self._chains or self.reasons else Trail(self.numbers)

    def keep_chain(self, shape: torch.Size, chain: LayerChain | None) -> None:
        """Keep the chain for a shape, or that there is none."""
        self._chains[shape] = chain

    def drop_chains(self) -> None:
        """Run the layers of all shapes one by one until they change."""
        self._chains = dict.fromkeys(self._chains)

    def program(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
        """Return a layer's program for inputs of this shape, recorded if it is the first call."""
        number = self._layers[id(layer)][0]
        hidden = args[0] if args else kwargs.get(HIDDEN)
        if not isinstance(hidden, Tensor) or number in self.reasons:
            return None
        key = number, hidden.shape
        program = self._programs.get(key)
        if program is None and key not in self._programs:
            program = self._programs[key] = self._recorded(number, layer, hidden, args, kwargs)
        return program

    def without_hooks(self) -> bool:
        """Return whether no layer has hooks."""
        return not private_torch.has_global_hooks() and not any(
            layer is None or has_hooks(layer) for layer in (ref() for _, ref in self._layers.values())
        )

    def _like_another(self, structure: Any, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
        """Return the program of a layer of equal structure, if it does for this one."""
        for known, program in self._structures:
            if known == structure:
                try:
                    return Program(layer, args, kwargs, like=program)
                except Unrecordable:
                    continue
        return None

    def _recorded(self, number: int, layer: Any, hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
        if hidden.dim() != 3 or hidden.shape[0] * hidden.shape[1] > MOST_FEW_ROWS:
            return None
        structure = hidden.shape, _structure(layer)
        try:
            program = self._like_another(structure, layer, args, kwargs)
            if program is None:
                program = Program(layer, args, kwargs)
                self._structures.append((structure, program))
            return program
        except Unrecordable as error:
            self.reasons[number] = str(error)
        except Exception as error:  # the layer's own error comes again when it runs
            self.reasons[number] = f"{type(error).__name__}: {error}"
        return None


@dataclass(frozen=True)
class TracedAnswer:
    """The layers with which an answer's steps run.

    Attributes:
        weights: the memory that programs read, which stays until the answer's end.
    """

    layers: TracedLayers
    weights: list[Tensor]


def begin_answer(model: Any) -> TracedAnswer | None:
    """Return the layers with which the next answer's steps run, or `None` for eager ones.

    The model must be attached.
    """
    if not _is_supported(model):
        return None
    with _lock:
        layers = _models.get(model)
        if layers is None:
            layers = _models[model] = TracedLayers(model)
        weights = layers.refresh(model)
    if weights is None:
        return None
    compiled_layers.install(model)
    return TracedAnswer(layers, weights)


def may_record(model: Any) -> bool:
    """Return whether nothing is known that keeps a model's layers from being recorded."""
    layers = _models.get(model)
    known = {} if layers is None else layers.reasons
    return _is_supported(model) and any(
        number not in known and _foreign(layer) is None for number, layer in compiled_layers.decoder_layers(model)
    )


def install(model: Any) -> None:
    """Prepare the layers of an attached model again, if an answer's steps ran as programs."""
    if model in _models:
        compiled_layers.install(model)


def layers_of(model: Any) -> TracedLayers | None:
    """Return what is known of a model's layers, `None` before its first answer."""
    return _models.get(model)


def _callers_of(model: Any) -> list[nn.Module]:
    """Return the modules whose code may call the layers: the model and those around them."""
    layers = {id(layer) for _, layer in compiled_layers.decoder_layers(model)}
    return [
        module for module in model.modules() if id(module) not in layers and any(id(each) in layers for each in module.modules())
    ]


def _code_of(modules: list[nn.Module]) -> list[Any]:
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


def _is_supported(model: Any) -> bool:
    found = modes.of_caller()
    plain = not found.autocast and found.device is None and not private_torch.has_global_hooks()
    plain = plain and private_torch.dispatch_mode() is not None
    first = next(model.parameters(), None)
    return plain and first is not None and first.is_cpu and native_products.instruction_set() is not None


def _foreign(layer: nn.Module) -> str | None:
    """Return why a layer's code is not recorded, or `None`."""
    for module in _modules_of(layer):
        name = type(module).__name__
        if not f"{type(module).__module__}.".startswith(OURS):
            return f"{name} is from outside of PyTorch and transformers"
        if module.training:
            return "it is in training mode"
        if module is not layer and any(module.__dict__.get(hooks) for hooks in _HOOKS):
            return f"{name} has hooks"
        forward = module.__dict__.get("forward")
        if forward is not None and not getattr(getattr(forward, "__func__", None), "__module__", "").startswith("specache."):
            return f"the forward of {name} was replaced"
    return None


def _modules_of(layer: nn.Module) -> list[nn.Module]:
    """Return a layer and the modules inside it: `modules()` takes ten times as long."""
    found = [layer]
    for module in found:
        found += [each for each in module._modules.values() if each is not None]
    return found


def _signature(modules: list[nn.Module]) -> Any:
    """Return what a layer's code may depend on, apart from inputs and the contents of weights."""
    return [
        (
            id(module),
            type(module),
            type(module).forward,
            _settings_of(module),
            [bool(module.__dict__.get(hooks)) for hooks in _HOOKS],
            _places_of(module._parameters),
            _places_of(module._buffers),
            _own_forward(module),
        )
        for module in modules
    ]


def _structure(layer: nn.Module) -> Any:
    """Return what two layers have in common for which one recording can serve: all but weights."""
    found = []
    for module in _modules_of(layer):
        settings = _settings_of(module)
        settings.pop("layer_idx", None)
        settings |= {
            name: repr(value) for name, value in module.__dict__.items() if type(value) in (list, tuple) and name[0] != "_"
        }
        names = tuple(name for owner in (module._parameters, module._buffers) for name, each in owner.items() if each is not None)
        found.append((type(module), type(module).forward, settings, _own_forward(module), names))
    return found


def _places_of(tensors: Mapping[str, Tensor | None]) -> list[Any]:
    """Return where tensors lie; of a class that packs its numbers, which object it is."""
    return [
        (name, id(t) if t is None or type(t) not in PLAIN else (t.shape, t.stride(), t.dtype, t.data_ptr()))
        for name, t in tensors.items()
    ]


def _configs_of(model: Any, layers: list[list[nn.Module]]) -> list[Any]:
    """Return the settings of all configurations that the layers can read."""
    modules = (module for layer in layers for module in layer)
    configs = {id(config): config for owner in (model, *modules) if (config := owner.__dict__.get("config")) is not None}
    return [(key, _settings_of(config)) for key, config in configs.items() if hasattr(config, "__dict__")]


def _settings_of(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in owner.__dict__.items() if type(value) in _SETTINGS}
