"""A model's decoder layers as graphs of `torch.compile`: one graph for all layers of one kind.

The layers of a model share one code, and their weights are inputs of the graph. So a 30-layer model
compiles one graph, which each step runs 30 times. The number of the layer must not be part of the
graph: it is set aside before the layer runs, and the operator `attend` looks it up. What surrounds
the layers (embedding, final norm, head) runs eagerly.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specache.attention.all_layers import StepOfLayers
from specache.engine import forward_pass
from specache.engine.forward_pass import ForwardPass
from specache.kernels.types import AttentionParams
from specache.model.per_layer import attention_modules
from specache.platform import private_torch

CURRENT_PASS = object()  # what layers are handed instead of the running pass, whose object differs in every step
CURRENT_LAYER = -1  # the number of the layer that runs, in graphs
MOST_KINDS = 64  # graphs of one model: kinds of layers, numbers of tokens, one sequence or several
OPTIONS = {
    "size_asserts": False,  # hundreds in a step
    "cpp_cache_precompile_headers": False,  # the preprocessor would run in every process
}

_numbers = itertools.count()
_installed: weakref.WeakKeyDictionary[Any, list[nn.Module]] = weakref.WeakKeyDictionary()
_library = torch.library.Library("specache", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor keys, Tensor values, int layer, float scaling, float? softcap, Tensor? sinks) -> Tensor"
)


class DecoderLayers(Protocol):
    """How a model's decoder layers run in a pass, instead of their own forward."""

    def number(self, layer: Any) -> int | None:
        """Return a layer's number, or `None` if it is not one of the model's."""

    def run(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one layer's forward."""


class _Running(threading.local):
    """What runs in a thread.

    Attributes:
        state: the running pass.
        layers: the layers of its model that run in their own way.
        layer: the number of the layer that runs.
    """

    def __init__(self) -> None:
        self.state: ForwardPass | None = None
        self.layers: DecoderLayers | None = None
        self.layer = CURRENT_LAYER


_running = _Running()


@dataclass(frozen=True, order=True)
class Variant:
    """One shape of a decode step.

    Attributes:
        tokens: tokens per sequence, 1 or 2.
        several: whether it decodes several sequences, of any number, or one.
    """

    tokens: int
    several: bool

    @property
    def name(self) -> str:
        return f"{self.tokens} x {'several' if self.several else 'one'}"


class CompiledLayers:
    """The compiled function of one model's decoder layers. It holds no reference to the model.

    Args:
        model: a model with at least one layer that `decoder_layers` finds.
        serial: compile one C++ file at a time, and start no worker processes.
    """

    def __init__(self, model: Any, serial: bool) -> None:
        self._numbers = weakref.WeakKeyDictionary({layer: number for number, layer in decoder_layers(model)})
        # Graphs are kept by code, so each model gets a code of its own.
        code = _layer.__code__.replace(co_name=f"decoder_layer_{next(_numbers)}")
        options = OPTIONS | ({"compile_threads": 1} if serial else {})
        arguments: dict[str, Any] = {"options": private_torch.known_options(options)}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            arguments["recompile_limit"] = MOST_KINDS
        self._function: Callable[..., Any] = torch.compile(FunctionType(code, globals()), **arguments)
        self._any_batch = False

    def number(self, layer: Any) -> int | None:
        """Return a layer's number, or `None` if it is not one of the model's."""
        return self._numbers.get(layer)

    def prepare(self, variants: Iterable[Variant], step: Callable[[int, int], None]) -> None:
        """Compile or load the graphs of these variants.

        Args:
            step: runs a step that uses these layers, given its tokens per sequence and sequences.
        """
        for variant in variants:
            self._any_batch = variant.several
            try:
                step(variant.tokens, 2 if variant.several else 1)
            finally:
                self._any_batch = False

    def run(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one layer's forward."""
        if self._any_batch:
            _free_batch([*args, *kwargs.values()])
        return self._function(layer, args, kwargs)


def decoder_layers(model: Any) -> Iterator[tuple[int, nn.Module]]:
    """Yield (number, module) of the decoder layers: members of a `ModuleList` that attend once.

    A layer whose forward was replaced is left out, and runs eagerly.
    """
    listed = [each for parent in model.modules() if isinstance(parent, nn.ModuleList) for each in parent]
    for layer in listed:
        numbers = [number for number, _ in attention_modules(layer)]
        replaced = layer.__dict__.get("forward")
        if len(numbers) == 1 and (replaced is None or is_ours(replaced)):
            yield numbers[0], layer


def install(model: Any) -> None:
    """Have the model's decoder layers run by what `running` says, until `remove`."""
    if model not in _installed:
        layers = [layer for _, layer in decoder_layers(model)]
        for layer in layers:
            layer.forward = MethodType(_forward, layer)  # a deep copy of the model gets its own method
        _installed[model] = layers


def remove(model: Any) -> None:
    """Undo `install`, if it ran."""
    for layer in _installed.pop(model, []):
        if is_ours(layer.__dict__.get("forward")):
            del layer.__dict__["forward"]


@contextmanager
def running(state: ForwardPass, layers: DecoderLayers) -> Iterator[None]:
    """Run decoder layers by `layers` inside the block, in this thread, and attend by `state`."""
    previous = _running.state, _running.layers, _running.layer
    _running.state, _running.layers = state, layers
    try:
        yield
    finally:
        _running.state, _running.layers, _running.layer = previous


def attend(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return the running pass's attention by the operator, as `ForwardPass.attention`.

    Args:
        layer: its number, or `CURRENT_LAYER`.
    """
    out: Tensor = torch.ops.specache.attend(query, keys, values, layer, scaling, softcap, sinks)
    return out


def attend_in_pass(index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """Return the running pass's attention, as `ForwardPass.attention`."""
    state = _running.state
    assert state is not None, "only layers of a running pass attend"
    return forward_pass.attend(state, index, query, keys, values, params)


class BlankPass:
    """A pass whose attention is zero: it makes a step compile, and stores nothing."""

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        return _attend_fake(query, keys, values, index, params.scaling, params.softcap, params.sinks)

    def begin_layers(self, numbers: Sequence[int], dtype: torch.dtype, kv_shape: tuple[int, int]) -> StepOfLayers:
        """Begin a step of all these layers without attention."""
        return StepOfLayers()


def _layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a layer's forward: the code that is compiled."""
    return type(layer).forward(layer, *args, **kwargs)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a decoder layer by what `running` says, else as it is."""
    layers = _running.layers
    number = None if layers is None else layers.number(layer)
    if layers is None or number is None:
        return type(layer).forward(layer, *args, **kwargs)
    _running.layer = number
    return layers.run(layer, args, kwargs)


def is_ours(forward: Any) -> bool:
    """Return whether a layer's forward is the one that `install` puts there."""
    return getattr(forward, "__func__", None) is _forward


def _free_batch(arguments: list[Any]) -> None:
    """Make the batch dimension of a layer's inputs free, and fix the others."""
    tensors = [each for argument in arguments for each in (argument if isinstance(argument, tuple) else (argument,))]
    tensors = [each for each in tensors if isinstance(each, Tensor) and each.dim() > 1]
    batch = max((each.shape[0] for each in tensors), default=0)
    for tensor in tensors:
        if tensor.shape[0] == batch:
            private_torch.free_size(tensor, 0)
        private_torch.fix_size(tensor, 1)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    number = _running.layer if layer == CURRENT_LAYER else layer
    return attend_in_pass(number, query, keys, values, AttentionParams(scaling=scaling, softcap=softcap, sinks=sinks))


def _attend_fake(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_zeros(batch, rows, heads, values.shape[-1])


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("specache::attend", _attend_fake, lib=_library)
