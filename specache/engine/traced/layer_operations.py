"""PyTorch's operations as those of `csrc/layer_program.hpp`.

`translate` has one entry per operation that a program can run. Everything else is `Unrecordable`:
the layer then stays as it is. Numbers of kinds and operations are those of the C++ enumerations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specache.linear import packed_weights
from specache.linear.cpu_linear import MOST_FEW_ROWS
from specache.platform import extension

ELEMENTWISE, MEAN, LAYER_NORM, PLAIN_PRODUCT, PACKED_PRODUCT = range(5)
COPY, NEGATE, SQUARE, ROOT, RECIPROCAL_ROOT, EXPONENTIAL, SIGMOID, TANH, RELU, SILU, GELU, GELU_TANH = range(12)
ADD, SUBTRACT, MULTIPLY, DIVIDE, AT_LEAST, AT_MOST = range(12, 18)
MOST_DIMS = 5

VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "_unsafe_view.default", "_reshape_alias.default", "t.default", "transpose.int", "permute.default"),
        *("unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "slice.Tensor", "select.int", "expand.default"),
        *("split.Tensor", "split_with_sizes.default", "unbind.int", "alias.default", "detach.default"),
    )
)
ALLOCATIONS = frozenset(
    ("aten.empty.memory_format", "aten.new_empty.default", "aten.empty_strided.default", "aten.empty_like.default")
)
_FILLED = {"aten.new_zeros.default": 0.0, "aten.zeros_like.default": 0.0, "aten.zeros.default": 0.0}
_UNARY = {
    "neg": NEGATE,
    "sqrt": ROOT,
    "rsqrt": RECIPROCAL_ROOT,
    "exp": EXPONENTIAL,
    "sigmoid": SIGMOID,
    "tanh": TANH,
    "relu": RELU,
    "silu": SILU,
    "clone": COPY,
}
_BINARY = {"add": ADD, "sub": SUBTRACT, "mul": MULTIPLY, "div": DIVIDE}


class Unrecordable(Exception):
    """A layer does something that a program cannot run."""


@dataclass(frozen=True)
class Operand:
    """A tensor in a buffer. `strides` and `offset` in bytes."""

    buffer: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def expanded(self, shape: Sequence[int]) -> Operand:
        """Return it broadcast to a shape."""
        more = len(shape) - len(self.shape)
        old = (1,) * more + self.shape
        if more < 0 or any(a != b and a != 1 for a, b in zip(old, shape, strict=True)):
            raise Unrecordable("shapes that do not broadcast")
        strides = (0,) * more + self.strides
        kept = tuple(0 if a == 1 else stride for a, stride in zip(old, strides, strict=True))
        return replace(self, shape=tuple(shape), strides=kept)

    def part(self, dim: int, start: int, size: int) -> Operand:
        """Return elements [start, start + size) of a dimension."""
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        return replace(self, offset=self.offset + start * self.strides[dim], shape=shape)

    @property
    def contiguous(self) -> bool:
        step = self.dtype.itemsize
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


MISSING = Operand(-1, torch.float32, 0, (), ())


@dataclass(frozen=True)
class Operation:
    """One operation of a program, as `Operation` of `csrc/layer_program.hpp`."""

    kind: int
    op: int
    sizes: tuple[int, ...]
    out: Operand
    inputs: tuple[Operand, ...]
    number: float = 0.0

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.out, *(each for each in self.inputs if each is not MISSING))


Place = Callable[[Any], Operand]  # where a tensor lies


def translate(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any, place: Place) -> list[Operation]:
    """Return the operations that do what a call of PyTorch's operation `name` did.

    Args:
        name: with its overload, for example "aten.add.Tensor".
        out: what it returned; `place` knows it already.

    Raises:
        Unrecordable: a program cannot run it.
    """
    if name in _FILLED:
        return [_elementwise(COPY, place(out), [], _FILLED[name])]
    space, base, overload = name.split(".")
    if space == "specache":
        return [_product(base, args, kwargs, out, place)]
    if space != "aten":
        raise Unrecordable(name)
    base = base.removesuffix("_")
    if base in _UNARY and overload == "default":
        return [_elementwise(_UNARY[base], place(out), [place(args[0])])]
    if base in _BINARY and overload in ("Tensor", "Scalar"):
        if kwargs.get("alpha", 1) != 1 or len(args) > 2:
            raise Unrecordable(f"{name} with a factor")
        return [_binary(_BINARY[base], place(out), args, place)]
    match name:
        case "aten.pow.Tensor_Scalar" if args[1] == 2:
            return [_elementwise(SQUARE, place(out), [place(args[0])])]
        case "aten.gelu.default":
            tanh = kwargs.get("approximate", "none") == "tanh"
            return [_elementwise(GELU_TANH if tanh else GELU, place(out), [place(args[0])])]
        case "aten._to_copy.default":
            if kwargs.get("device") not in (None, torch.device("cpu")):
                raise Unrecordable("a copy to another device")
            return [_elementwise(COPY, place(out), [place(args[0])])]
        case "aten.copy_.default":
            return [_elementwise(COPY, place(args[0]), [place(args[1])])]
        case "aten.clamp.default":
            return _clamp(args, kwargs, place(out), place)
        case "aten.cat.default":
            return _cat(args, kwargs, place(out), place)
        case "aten.stack.default":
            return _stack(args, kwargs, place(out), place)
        case "aten.mean.dim":
            return [_mean(args, kwargs, place(out), place)]
        case "aten.native_layer_norm.default":
            return [_layer_norm(args, place(out[0]), place)]
    raise Unrecordable(name)


def _elementwise(op: int, out: Operand, inputs: list[Operand], number: float = 0.0) -> Operation:
    places = [out, *(each.expanded(out.shape) for each in inputs)]
    sizes, strides = _merged(out.shape, [each.strides for each in places])
    out, *inputs = (replace(each, shape=sizes, strides=kept) for each, kept in zip(places, strides, strict=True))
    return Operation(ELEMENTWISE, op, sizes, out, tuple(inputs) or (MISSING,), number)


def _binary(op: int, out: Operand, args: Sequence[Any], place: Place) -> Operation:
    a, b = args
    if not isinstance(a, Tensor):
        raise Unrecordable("a number before a tensor")
    if isinstance(b, Tensor):
        return _elementwise(op, out, [place(a), place(b)])
    return _elementwise(op, out, [place(a)], _number(b))


def _clamp(args: Sequence[Any], kwargs: dict[str, Any], out: Operand, place: Place) -> list[Operation]:
    low, high = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in ((1, "min"), (2, "max")))
    operations, source = [], place(args[0])
    for op, bound in ((AT_LEAST, low), (AT_MOST, high)):
        if bound is not None:
            operations.append(_elementwise(op, out, [source], _number(bound)))
            source = out
    return operations or [_elementwise(COPY, out, [source])]


def _cat(args: Sequence[Any], kwargs: dict[str, Any], out: Operand, place: Place) -> list[Operation]:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(out.shape)
    operations, start = [], 0
    for tensor in args[0]:
        if tensor.numel() == 0:
            continue
        source = place(tensor)
        if len(source.shape) != len(out.shape):
            raise Unrecordable("cat of tensors of other dimensions")
        operations.append(_elementwise(COPY, out.part(dim, start, source.shape[dim]), [source]))
        start += source.shape[dim]
    return operations


def _stack(args: Sequence[Any], kwargs: dict[str, Any], out: Operand, place: Place) -> list[Operation]:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(out.shape)
    operations = []
    for i, tensor in enumerate(args[0]):
        source = place(tensor)
        shape, strides = ((*each[:dim], more, *each[dim:]) for each, more in ((source.shape, 1), (source.strides, 0)))
        operations.append(_elementwise(COPY, out.part(dim, i, 1), [replace(source, shape=shape, strides=strides)]))
    return operations


def _mean(args: Sequence[Any], kwargs: dict[str, Any], out: Operand, place: Place) -> Operation:
    x = place(args[0])
    keeps = len(args) > 2 and args[2] is True
    if list(args[1] or ()) not in ([-1], [len(x.shape) - 1]) or kwargs.get("dtype") not in (None, x.dtype):
        raise Unrecordable("a mean of other dimensions")
    rows = out.strides[:-1] if keeps else out.strides
    return _of_rows(MEAN, x, replace(out, shape=x.shape, strides=(*rows, 0)), [])


def _layer_norm(args: Sequence[Any], out: Operand, place: Place) -> Operation:
    x, shape, weight, bias, epsilon = args
    if len(shape) != 1:
        raise Unrecordable("a norm of several dimensions")
    places = [MISSING if each is None else place(each).expanded(x.shape) for each in (weight, bias)]
    return _of_rows(LAYER_NORM, place(x), out, places, epsilon)


def _of_rows(kind: int, x: Operand, out: Operand, more: list[Operand], number: float = 0.0) -> Operation:
    """Return an operation on whole rows, whose last dimension must stay one."""
    if len(x.shape) > MOST_DIMS:
        raise Unrecordable("more than five dimensions")
    return Operation(kind, 0, x.shape, out, (x, *more), number)


def _product(base: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor, place: Place) -> Operation:
    if kwargs:
        raise Unrecordable("a product with named arguments")
    packed = base == "packed_linear"
    x, *tensors = args[:-1] if packed else args
    rows, inputs, outputs = x.numel() // x.shape[-1], x.shape[-1], out.shape[-1]
    source, bias = place(x), tensors[-1]
    weight: Tensor = tensors[0]
    sound = weight.shape[1] * packed_weights.BLOCK == inputs and weight.is_contiguous() if packed else _plain_fits(x, weight)
    if not (0 < rows <= MOST_FEW_ROWS and source.contiguous and out.is_contiguous() and sound):
        raise Unrecordable("a product that is PyTorch's")
    if bias is not None and (bias.dtype is not x.dtype or not bias.is_contiguous()):
        raise Unrecordable("a bias of another dtype")
    if packed and any(each is not None and not each.is_contiguous() for each in tensors):
        raise Unrecordable("codes that are not contiguous")
    stride = 0 if packed else weight.stride(0) * weight.itemsize
    places = [MISSING if each is None else place(each) for each in tensors]
    operands = [replace(each, shape=(), strides=(stride, 0, 0)) for each in (source, *places, place(out))]
    *into, target = (MISSING if each.buffer < 0 else each for each in operands)
    return Operation(PACKED_PRODUCT if packed else PLAIN_PRODUCT, 0, (rows, inputs, outputs), target, tuple(into))


def _plain_fits(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype is x.dtype and weight.stride(1) == 1 and weight.shape[1] == x.shape[-1]


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Unrecordable("an argument that is no number")
    return float(value)


def _merged(shape: Sequence[int], strides: list[tuple[int, ...]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Return a shape without dimensions of size 1, those merged that lie evenly in all operands."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        here = [each[dim] for each in strides]
        if sizes and all(kept[-1] == stride * size for kept, stride in zip(merged, here, strict=True)):
            sizes[-1] *= size
            for kept, stride in zip(merged, here, strict=True):
                kept[-1] = stride
        else:
            sizes.append(size)
            for kept, stride in zip(merged, here, strict=True):
                kept.append(stride)
    if not sizes:
        sizes, merged = [1], [[0] for _ in strides]
    if len(sizes) > MOST_DIMS:
        raise Unrecordable("more than five dimensions")
    return tuple(sizes), [tuple(each) for each in merged]


def numbers_of(operand: Operand, dims: int) -> tuple[int, int, int, list[int]]:
    """Return an operand as the extension takes it: buffer, dtype, offset and strides.

    The dtype of codes and their scales does not matter: products know it.
    """
    if operand is MISSING:
        return -1, 0, 0, []
    strides = [*operand.strides, *[0] * (dims - len(operand.strides))]
    return operand.buffer, extension.DTYPES.get(operand.dtype, 0), operand.offset, strides
