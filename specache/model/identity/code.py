"""The code that a module runs beside its class's: forward hooks, and forwards that were replaced.

Functions are compared by their code and by the numbers and tensors that they enclose, so that a
hook that is put on again is equal. Other enclosed objects count as what they are, not by content.
Hooks of PyTorch, transformers, accelerate, peft and this package do not count: what they change is
in weights and settings, or changes no result. One of the user's that they decorate or run does.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from specache.model.function_origin import is_from_library, is_installed, uncompiled
from specache.model.identity.held_tensors import held_tensors
from specache.model.identity.offloaded_weights import hooks_of
from specache.model.identity.samples import content_digest
from specache.platform.private_torch import global_hooks

Code = tuple[tuple[str, Any, tuple[Any, ...]], ...]  # (what it is, its code, enclosed values)
_PLAIN = {type(None), bool, int, float, str}
_HOOKS = {"_forward_pre_hooks": "a hook before its forward", "_forward_hooks": "a forward hook"}
_OF_ACCELERATE = "a hook of accelerate"


def code_of(module: nn.Module) -> Code:
    """Return a module's own code beside its class's, and the class's if it was replaced."""
    return tuple(_marks(module))


def is_hooked(model: nn.Module) -> bool:
    """Return whether a module has a forward hook, or a forward of its own, that is no library's.

    Hooks for all modules of the process count, and so do modules of the user's own classes in a
    model whose class is not: they wrap or replace parts of it.
    """
    if any(not is_from_library(hook) for hook in global_hooks()) or any(_is_hooked(module) for module in model.modules()):
        return True
    of_classes = {function for kind in {type(module) for module in model.modules()} for _, function in _of_class(kind)}
    return is_installed(type(model).forward) and not all(map(is_installed, of_classes))


def code_digest(model: nn.Module) -> str:
    """Return a digest of the code of all modules, "" if there is none.

    It is the same in another process that puts the same hooks on, as far as those enclose numbers,
    strings and tensors; other objects count by their class. Of users' modules the tensors in their
    attributes count too.
    """
    found = [(name, code, module) for name, module in model.named_modules() if (code := code_of(module))]
    if not found:
        return ""
    digest = hashlib.sha256()
    for name, code, module in found:
        digest.update(repr((name, [(what, _stable(own), [*map(_stable, values)]) for what, own, values in code])).encode())
        digest.update("".join(map(repr, held_tensors(module))).encode())
    return digest.hexdigest()


def _stable(value: Any) -> Any:
    """Return what a value of a mark is in any process of this Python."""
    if isinstance(value, CodeType):
        return value.co_name, value.co_code, value.co_names, [*map(_stable, value.co_consts)]
    if isinstance(value, tuple):
        return tuple(map(_stable, value))
    if isinstance(value, type):
        return value.__module__, value.__qualname__
    if isinstance(value, frozenset):
        return sorted(map(repr, value))  # their order differs from process to process
    return value.kind if isinstance(value, _Same) else value


def _marks(module: nn.Module) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    for what, function in _of_class(type(module)):
        if not is_from_library(function):
            yield what, *_mark(function)
    own = _own_forward(module)
    if own is not None:
        yield "a forward of its own", *_mark(own)
    for what, hook in _hooks(module):
        if not is_from_library(hook):
            yield what, *_mark(hook)


def _of_class(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Return (what it is, function) of what runs when a module of a class is called."""
    return ("a forward of its class", kind.forward), ("a __call__ of its class", kind.__call__)


def _hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (what it is, hook) of a module's forward hooks, those that accelerate runs included."""
    for name, what in _HOOKS.items():
        yield from ((what, hook) for hook in getattr(module, name).values())
    yield from ((_OF_ACCELERATE, hook) for hook in hooks_of(module))


def _own_forward(module: nn.Module) -> Any | None:
    """Return the forward that was put on a module, `None` if it is its class's or a library's."""
    own = module.__dict__.get("forward")
    if own is None or getattr(uncompiled(own), "__func__", None) is type(module).forward or is_from_library(own):
        return None
    return own


def _is_hooked(module: nn.Module) -> bool:
    return _own_forward(module) is not None or any(not is_from_library(hook) for _, hook in _hooks(module))


def _mark(function: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return (code, enclosed values) of a function, and of those that it wraps."""
    wrapped = getattr(function, "__dict__", {}).get("__wrapped__")
    code, values = _mark_of_one(function)
    if wrapped is None or isinstance(function, MethodType):
        return code, values
    inner, enclosed = _mark(wrapped)
    return (code, inner), (*values, *enclosed)


def _mark_of_one(function: Any) -> tuple[Any, tuple[Any, ...]]:
    if isinstance(function, functools.partial):
        code, values = _mark(function.func)
        return code, (*values, *map(_value, function.args), *map(_value, function.keywords.values()))
    if isinstance(function, MethodType):
        code, values = _mark(function.__func__)
        return code, (*values, _value(function.__self__))
    if isinstance(function, FunctionType):
        enclosed = [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
        return function.__code__, tuple(map(_value, [*enclosed, *(function.__defaults__ or ())]))
    return type(function), (_value(function),)


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _value(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        known = not value.is_meta and value.layout is torch.strided and not value.is_quantized
        return tuple(value.shape), value.dtype, content_digest(value) if known else None
    value = getattr(value, "__func__", value)  # of a bound method, which is made anew whenever it is asked for
    return value.__code__ if isinstance(value, FunctionType) else _Same(value)  # neither keeps a model alive


class _Same:
    """Equal only for the same object, which it does not keep alive."""

    def __init__(self, value: Any) -> None:
        self.kind = type(value).__qualname__
        try:
            self._held: Any = weakref.ref(value)
        except TypeError:
            self._held = None
        self._id = id(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._id != other._id:
            return False
        return self._held is None or (self._held() is not None and other._held is not None and self._held() is other._held())

    __hash__ = None  # type: ignore[assignment]
