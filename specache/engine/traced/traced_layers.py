"""A model's decoder layers as programs (`program`), recorded when a shape of step first comes.

A decode step of an eager layer is many small operations, which Python hands to PyTorch one by one:
on two cores that takes several times as long as reading the weights. A program takes two calls per
layer, and a chain of them (`layer_chain`) one call per step. They are recorded from the model's own
code, so no model is written down here a second time.

What a program would not notice stays eager: layers with hooks, forwards or functions of somebody
else's, modules from outside of PyTorch, transformers and this package, other modes of PyTorch.
Whether a layer still is what was recorded is looked at before every answer: modules, settings,
hooks, where the weights lie, and the functions that it calls (`reached_code`). A shorter look in
every step (`SeenLayers`) sees what was replaced meanwhile.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specache.engine import compiled_layers
from specache.engine.traced.call_shape import HIDDEN
from specache.engine.traced.layer_chain import LayerChain, Trail
from specache.engine.traced.layer_operations import Unrecordable
from specache.engine.traced.layer_state import (
    FORWARD_HOOKS,
    INTERNAL,
    SeenLayers,
    configs_of,
    forwards_of,
    has_hooks,
    modules_of,
    place_of,
    signature_of,
    structure_of,
)
from specache.engine.traced.program import Program
from specache.engine.traced.reached_code import ReachedCode, somebody_elses
from specache.linear import native_products
from specache.linear.cpu_linear import MOST_FEW_ROWS
from specache.platform import forks, modes, private_torch

OURS = ("torch.nn.", "transformers.", "specache.")  # where modules come from whose code we record

_models: weakref.WeakKeyDictionary[Any, TracedLayers] = weakref.WeakKeyDictionary()
_lock = forks.lock()


class TracedLayers:
    """The programs of one model's decoder layers as they are. It holds no reference to the model.

    A changed model gets another object.

    Attributes:
        reasons: why layers are not recorded, by number.
    """

    def __init__(self, model: Any) -> None:
        layers = list(compiled_layers.decoder_layers(model))
        modules = [modules_of(layer) for _, layer in layers]
        self._layers = {id(layer): (number, weakref.ref(layer)) for number, layer in layers}
        self._callers = [weakref.ref(module) for module in _callers_of(model)]
        self._programs: dict[tuple[int, torch.Size], Program | None] = {}
        self._structures: list[tuple[Any, Program]] = []  # of layers that were recorded, and their programs
        self._chains: dict[torch.Size, LayerChain | None] = {}
        self._signature = self._signature_of(model, modules)
        self._places = {place for weight in self.weights() if (place := place_of(weight)) is not None}
        self.reasons = {number: reason for number, layer in layers if (reason := _foreign(layer)) is not None}
        codes: dict[frozenset[type], ReachedCode] = {}
        for (number, _), inside in zip(layers, modules, strict=True):
            kinds = frozenset(map(type, inside))
            if number not in self.reasons:
                code = codes[kinds] = codes.get(kinds) or ReachedCode(kinds)
                if code.foreign is not None:
                    self.reasons[number] = f"it calls {code.foreign}"
        self._codes = list(codes.values())

    def are_still(self, model: Any) -> bool:
        """Return whether the model's layers are what they were when this was made."""
        found = list(compiled_layers.decoder_layers(model))
        mine = list(self._layers.values())
        same_layers = len(found) == len(mine) and all(
            number == known and ref() is layer for (number, layer), (known, ref) in zip(found, mine, strict=True)
        )
        return (
            same_layers
            and self._signature == self._signature_of(model, [modules_of(layer) for _, layer in found])
            and all(code.is_unchanged() for code in self._codes)
        )

    def weights(self) -> list[Tensor]:
        """Return the layers' weights."""
        found = (module for layer in self.modules() for module in modules_of(layer))
        weights = (weight for module in found for weight in (*module._parameters.values(), *module._buffers.values()))
        return [weight.detach() for weight in weights if weight is not None]

    def _signature_of(self, model: Any, modules: list[list[nn.Module]]) -> Any:
        callers = [module for ref in self._callers if (module := ref()) is not None]
        return [signature_of(each) for each in modules], configs_of(model, modules), forwards_of(callers)

    def reads_only(self, weights: list[Tensor]) -> bool:
        """Return whether programs read no other memory than that of these."""
        return self._places <= {place_of(weight) for weight in weights}

    def number(self, layer: Any) -> int | None:
        """Return a layer's number, or `None` if it is not one of the model's."""
        number, ref = self._layers.get(id(layer), (None, None))
        return number if ref is not None and ref() is layer else None

    def modules(self) -> list[nn.Module]:
        """Return the layers that are still there."""
        return [layer for _, ref in self._layers.values() if (layer := ref()) is not None]

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
            program = self._recorded(number, layer, hidden, args, kwargs)
            if program is not None and not program.places <= self._places:
                return None  # a weight was replaced meanwhile, and nobody keeps the memory of the new one
            self._programs[key] = program
        return program

    def without_hooks(self) -> bool:
        """Return whether no layer has hooks."""
        return not private_torch.has_global_hooks() and not any(
            layer is None or has_hooks(layer, FORWARD_HOOKS) for layer in (ref() for _, ref in self._layers.values())
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
        structure = hidden.shape, structure_of(layer)
        try:
            program = self._like_another(structure, layer, args, kwargs)
            if program is None:
                program = Program(layer, args, kwargs)
                if program.places <= self._places:
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
        seen: the layers as they were when it began.
    """

    layers: TracedLayers
    weights: list[Tensor]
    seen: SeenLayers


def begin_answer(model: Any) -> TracedAnswer | None:
    """Return the layers with which the next answer's steps run, or `None` for eager ones.

    The model must be attached.
    """
    if not _is_supported(model):
        return None
    with _lock:
        layers = _models.get(model)
        if layers is None or not layers.are_still(model):
            layers = _models[model] = TracedLayers(model)  # running answers of other threads keep theirs
    if len(layers.reasons) == len(layers.numbers):
        return None
    compiled_layers.install(model)
    answer = TracedAnswer(layers, layers.weights(), SeenLayers(model, layers.modules()))
    return answer if layers.reads_only(answer.weights) else None


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


def _is_supported(model: Any) -> bool:
    found = modes.of_caller()
    plain = not found.autocast and found.device is None and not sees_operations()
    plain = plain and private_torch.dispatch_mode() is not None
    first = next(model.parameters(), None)
    return plain and first is not None and first.is_cpu and native_products.instruction_set() is not None


def sees_operations() -> bool:
    """Return whether something sees a layer's operations, or changes them, that sees no program."""
    return torch.is_autocast_enabled("cpu") or private_torch.has_global_hooks() or private_torch.has_modes()


def _foreign(layer: nn.Module) -> str | None:
    """Return why a layer's code is not recorded, or `None`."""
    for module in modules_of(layer):
        name = type(module).__name__
        if not f"{type(module).__module__}.".startswith(OURS):
            return f"{name} is from outside of PyTorch and transformers"
        if module.training:
            return "it is in training mode"
        if module is not layer and has_hooks(module):
            return f"{name} has hooks"
        forward = module.__dict__.get("forward")
        if forward is not None and not getattr(getattr(forward, "__func__", None), "__module__", "").startswith("specache."):
            return f"the forward of {name} was replaced"
        for attribute, value in module.__dict__.items():
            if attribute not in INTERNAL and (function := somebody_elses(value)) is not None:
                return f"{name} has the function {function}"
    return None
