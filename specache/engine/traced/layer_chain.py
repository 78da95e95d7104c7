"""All decoder layers of a step in one call: their programs, each with its attention in the middle.

The model's own code still calls every layer. The first call runs the chain, and the others return
what it computed. So a chain is made only after a step in which each layer was handed exactly the
result of the one before it, and all of them the same other arguments. Every later call is compared
with that; where one differs, or the rows of a layer cannot be read, `ChainBrokenError` has the pass
undone and run again layer by layer.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specache.attention.all_layers import StepOfLayers
from specache.engine.traced.call_shape import HIDDEN, STATE
from specache.engine.traced.layer_operations import Unrecordable
from specache.engine.traced.layer_state import FORWARD_HOOKS, has_hooks
from specache.engine.traced.program import Program
from specache.kernels.finite import not_finite
from specache.linear import native_products
from specache.platform import extension
from specache.platform.step_threads import step_threads

ALL_FINITE = -1  # csrc/in_place.hpp


class ChainBrokenError(Exception):
    """A pass cannot go on as a chain: it is undone, and run again layer by layer."""


class ChainLayer(NamedTuple):
    """One layer of a chain.

    Attributes:
        number: of its attention.
        module: the layer.
    """

    number: int
    module: nn.Module
    program: Program


class LayerChain:
    """The programs of a model's decoder layers, one after the other, for inputs of one shape.

    Raises:
        Unrecordable: they are no chain.
    """

    def __init__(self, layers: Sequence[ChainLayer]) -> None:
        self._programs = [layer.program for layer in layers]
        self.numbers = [layer.number for layer in layers]
        first = self._programs[0]
        shape, strides, _, self._dtype = first.call.hidden
        self._shape, self._result_bytes = (len(layers), *shape), torch.Size(shape).numel() * self._dtype.itemsize
        self._native = extension.native.LayerChain()
        for program in self._programs:
            if (
                program.call is not first.call
                or program.kv_shape != first.kv_shape
                or program.result_spec != (shape, strides, 0, self._dtype)
            ):
                raise Unrecordable("layers that differ")
            program.add_to(self._native)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """KV heads and head dimension."""
        return self._programs[0].kv_shape

    @property
    def query_dtype(self) -> torch.dtype:
        return self._programs[0].query_dtype

    def begins_with(self, program: Program) -> bool:
        """Return whether this program is the chain's first."""
        return program is self._programs[0]

    def returned(self, index: int, result: Tensor) -> Any:
        """Return a layer's result as the layer does."""
        return self._programs[index].returned(result)

    def run(self, addresses: list[int], step: StepOfLayers) -> list[Tensor]:
        """Run all layers and return their results.

        Args:
            addresses: of the first layer's call, from `CallShape.addresses`.

        Raises:
            ChainBrokenError: rows of a layer cannot be read.
            NonFiniteError: a committed key or value is NaN or infinity.
        """
        with torch.inference_mode(False):  # so that they count what is written into them
            results = torch.empty(self._shape, dtype=self._dtype, device="cpu")
        try:
            ran, code, counts, _ = self.call(addresses, results, step)
        except Exception:
            step.drop()
            raise
        if code >= 0:
            raise not_finite(self.numbers[ran], "values" if code % 2 else "keys")
        if code != ALL_FINITE:
            step.drop()
            raise ChainBrokenError(f"rows of layer {self.numbers[ran]} cannot be read")
        step.end(counts)
        return list(results.unbind(0))

    def call(self, addresses: list[int], results: Tensor, step: StepOfLayers) -> tuple[int, int, list[Any], float]:
        """Run all layers in C++.

        Returns:
            how many layers ran to their end, what ended the next one, the counts of each layer and
            sequence, and the seconds that attention took.
        """
        hidden, *inputs = addresses
        outcome: tuple[int, int, list[Any], float] = self._native.run(
            step.isa or native_products.instruction_set(),
            step_threads(),
            hidden,
            inputs,
            results.data_ptr(),
            self._result_bytes,
            step.natives,
            step.counts,
            step.hot,
            step.on_disk,
            [positions.data_ptr() for positions in step.next_positions],
            step.commits,
            step.top_k,
            step.real_queries,
        )
        return outcome


class Trail:
    """What the layers of a pass were called with: whether they are a chain.

    Args:
        numbers: of all the model's layers.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._wanted = list(numbers)
        self._layers: list[ChainLayer] = []
        self._last: tuple[Tensor, Tensor] | None = None  # the last layer's result, and a copy of it
        self._others: list[Any] = []
        self.broken = False

    def note(self, layer: ChainLayer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> LayerChain | None:
        """Note a layer's call and its result.

        Returns:
            The chain, if this was its last layer.
        """
        hidden, others = inputs_of(args, kwargs)
        if self._last is None:
            self._others = others
        else:
            result, copy = self._last
            self.broken |= not (hidden is result and torch.equal(result, copy) and same(others, self._others))
        result = out[0] if isinstance(out, tuple) else out
        self._last = result, result.clone()
        self._layers.append(layer)
        done = len(self._layers)
        self.broken |= layer.number != self._wanted[done - 1] or has_hooks(layer.module, FORWARD_HOOKS)
        if self.broken or done < len(self._wanted):
            return None
        return LayerChain(self._layers)


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return a call's hidden states, and the other arguments apart from the running pass."""
    if args:
        return args[0], [*args[1:], *(value for name, value in kwargs.items() if name != STATE)]
    return kwargs.get(HIDDEN), [value for name, value in kwargs.items() if name not in (HIDDEN, STATE)]


def same(some: list[Any], others: list[Any]) -> bool:
    """Return whether these are the same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))
