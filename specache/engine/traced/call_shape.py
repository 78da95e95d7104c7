"""What the calls of a layer have in common that one program serves."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from specache.engine.traced.layer_operations import Unrecordable
from specache.platform import extension

STATE = "specache"  # the argument in which a layer is handed the running pass
HIDDEN = "hidden_states"  # and its input
PLAIN_VALUES = (type(None), bool, int, float, str)

Path = tuple[int | str, int | None]  # an argument, and which of its parts
Spec = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]  # shape, strides, offset in bytes, dtype


class CallShape:
    """What the calls have in common for which a program was recorded.

    Equal ones are one object (`of`), so that a step compares its arguments once for all layers.
    """

    _known: ClassVar[weakref.WeakValueDictionary[Any, CallShape]] = weakref.WeakValueDictionary()

    def __init__(
        self, count: int, names: tuple[str, ...], paths: tuple[Path, ...], specs: tuple[Spec, ...], plain: tuple[Any, ...]
    ) -> None:
        self._count, self._names, self._paths, self._specs, self._plain = count, names, paths, specs, plain

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CallShape, list[Tensor]]:
        """Return a call's shape, and its tensors of float types, in order.

        Raises:
            Unrecordable: an argument is neither a tensor nor a plain value, or the first one is not
                the hidden states.
        """
        paths, tensors, plain = _inputs(args, kwargs)
        if not paths or paths[0] != (0 if args else HIDDEN, None):
            raise Unrecordable("the hidden states are not its first argument")
        values = tuple((path, type(value), value) for path, value in plain)
        key = len(args), tuple(kwargs), tuple(paths), tuple(spec_of(each) for each in tensors), values
        return cls._known.setdefault(key, cls(*key[:4], tuple(plain))), tensors

    @property
    def hidden(self) -> Spec:
        """How the hidden states lie."""
        return self._specs[0]

    def addresses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
        """Return where the memory of a call's tensors begins, `None` if the call is another one.

        The first tensor is the hidden states. The others are mostly the same objects for all layers
        of a step, so they are remembered in `step`.
        """
        if len(args) != self._count or tuple(kwargs) != self._names:
            return None
        hidden = _at(self._paths[0], args, kwargs)
        shape, strides, offset, dtype = self._specs[0]
        if type(hidden) is not Tensor or hidden.dtype is not dtype or hidden.shape != shape or hidden.stride() != strides:
            return None
        if hidden.storage_offset() * dtype.itemsize != offset:
            return None
        first = hidden.data_ptr() - offset
        others = [*args[1:], *[value for name, value in kwargs.items() if name not in (HIDDEN, STATE)]]
        if _step.shape is self and all(map(operator.is_, others, _step.others)):
            return [first, *_step.addresses]
        for path, value in self._plain:
            if (found := _at(path, args, kwargs)) != value or type(found) is not type(value):
                return None
        addresses = []
        for path, spec in zip(self._paths[1:], self._specs[1:], strict=True):
            tensor = _at(path, args, kwargs)
            if type(tensor) is not Tensor or spec_of(tensor) != spec:
                return None
            addresses.append(tensor.data_ptr() - spec[2])
        if _step.open:
            _step.shape, _step.others, _step.addresses = self, others, addresses
        return [first, *addresses]


class _Step(threading.local):
    """What the layers of the running step were last called with; the objects stay alive."""

    def __init__(self) -> None:
        self.open = self.ran_program = False
        self.shape: CallShape | None = None
        self.others: list[Any] = []
        self.addresses: list[int] = []


_step = _Step()


def note_program() -> None:
    """Note that a layer of the running step ran as a program."""
    _step.ran_program = True


def ran_program() -> bool:
    """Return whether a layer of this thread's last step ran as a program."""
    return _step.ran_program


@contextmanager
def step() -> Iterator[None]:
    """Run one step of this thread: what its layers share is looked at once."""
    _step.open, _step.ran_program = True, False
    try:
        yield
    finally:
        _step.open, _step.shape, _step.others = False, None, []


def spec_of(tensor: Tensor) -> Spec:
    """Return how a tensor lies."""
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) * tensor.itemsize, tensor.dtype


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], list[Tensor], list[Any]]:
    """Return the paths of a call's tensors of float types, the tensors, and its plain values."""
    paths: list[Any] = []
    tensors: list[Tensor] = []
    plain: list[Any] = []
    named = [(index, value) for index, value in enumerate(args)] + [
        (name, value) for name, value in kwargs.items() if name != STATE
    ]
    for key, value in named:
        parts = [((key, i), each) for i, each in enumerate(value)] if isinstance(value, tuple) else [((key, None), value)]
        for path, each in parts:
            if type(each) is Tensor and each.dtype in extension.DTYPES:
                paths.append(path)
                tensors.append(each)
            elif isinstance(each, PLAIN_VALUES):
                plain.append((path, each))
            elif type(each) is not Tensor:  # others, as position ids, are not known to a recorder that meets them
                raise Unrecordable(f"the argument {key}")
    return paths, tensors, plain


def _at(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    key, part = path
    value = args[key] if isinstance(key, int) else kwargs[key]
    if part is None:
        return value
    return value[part] if isinstance(value, tuple) and part < len(value) else None
