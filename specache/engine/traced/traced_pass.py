"""One pass of a model whose decoder layers run as programs, layer by layer or all in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specache.attention.all_layers import StepOfLayers
from specache.engine import compiled_layers
from specache.engine.traced.call_shape import note_program
from specache.engine.traced.layer_chain import ChainBrokenError, ChainLayer, LayerChain, Trail, inputs_of, same
from specache.engine.traced.layer_operations import Unrecordable
from specache.engine.traced.program import Program
from specache.engine.traced.traced_layers import TracedLayers, sees_operations

BeginLayers = Callable[[Sequence[int], torch.dtype, tuple[int, int]], StepOfLayers | None]


class TracedPass:
    """One pass of a model whose layers run as programs.

    Args:
        begin: begins the attention of all layers, given their numbers, the dtype of the queries, KV
            heads and head dimension; `None` runs them layer by layer.
    """

    def __init__(self, layers: TracedLayers, begin: BeginLayers | None) -> None:
        self._layers = layers
        self._begin = begin
        self._begun = False
        self._trail: Trail | None = None
        self._chain: LayerChain | None = None
        self._results: list[Tensor] = []
        self._returned = self._version = 0
        self._others: list[Any] = []
        self._eager: bool | None = None  # whether something sees this pass's operations

    def number(self, layer: Any) -> int | None:
        """Return a layer's number, or `None` if it is not one of the model's."""
        return self._layers.number(layer)

    def run(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one layer's forward: in a chain or as a program, if it has one for such a call."""
        if self._chain is not None:
            return self._from_chain(self._chain, layer, args, kwargs)
        if self._eager is None:
            self._eager = sees_operations()
        if self._eager:
            return type(layer).forward(layer, *args, **kwargs)
        program = self._layers.program(layer, args, kwargs)
        addresses = None if program is None else program.call.addresses(args, kwargs)
        if program is None or addresses is None:
            if self._trail is not None:
                self._trail.broken = True
            return type(layer).forward(layer, *args, **kwargs)
        note_program()
        if not self._begun and self._begin is not None:
            self._begun = True
            hidden, others = inputs_of(args, kwargs)
            self._trail = self._layers.trail(hidden.shape)
            if self._run_chain(program, addresses, hidden.shape):
                self._others = others
                assert self._chain is not None, "it just ran"
                return self._next(self._chain)
        out = program.run(addresses, compiled_layers.attend_in_pass)
        if self._trail is not None:
            self._note(self._trail, layer, program, args, kwargs, out)
        return out

    def _run_chain(self, program: Program, addresses: list[int], shape: torch.Size) -> bool:
        """Run all layers if they are a chain. Return whether they ran."""
        chain = self._layers.chain(shape)
        if chain is None or self._begin is None or not chain.begins_with(program) or not self._layers.without_hooks():
            return False
        step = self._begin(chain.numbers, chain.query_dtype, chain.kv_shape)
        if step is None:
            return False
        self._results = chain.run(addresses, step)
        self._version = self._results[0]._version
        self._chain = chain
        return True

    def _from_chain(self, chain: LayerChain, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the chain computed for the next layer, if this is its call."""
        hidden, others = inputs_of(args, kwargs)
        known = 0 < self._returned < len(self._results) and self._layers.number(layer) == chain.numbers[self._returned]
        if not (
            known
            and hidden is self._results[self._returned - 1]
            and hidden._version == self._version  # nothing was written into it
            and same(others, self._others)
        ):
            self._layers.drop_chains()
            raise ChainBrokenError("a layer was not handed what the one before it returned")
        return self._next(chain)

    def end(self) -> None:
        """Check that every layer that ran was called.

        Raises:
            ChainBrokenError: the model called fewer.
        """
        if self._returned != len(self._results):
            self._layers.drop_chains()
            raise ChainBrokenError("the model did not call all layers")

    def _next(self, chain: LayerChain) -> Any:
        self._returned += 1
        return chain.returned(self._returned - 1, self._results[self._returned - 1])

    def _note(self, trail: Trail, layer: Any, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        number, shape = self._layers.number(layer), inputs_of(args, kwargs)[0].shape
        assert number is not None, "it has a program"
        try:
            chain = trail.note(ChainLayer(number, layer, program), args, kwargs, out)
        except Unrecordable:
            chain, trail.broken = None, True
        if chain is not None or trail.broken:
            self._layers.keep_chain(shape, chain)
            self._trail = None
