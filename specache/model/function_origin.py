"""Whether a function that a model calls is a library's, or its user's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import PurePath
from types import FunctionType, MethodType
from typing import Any

_LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.", "kernels.", "specache.")
_CODE_OF_MODELS = "transformers_modules."  # that came with a model's files
_INSTALLED = {"site-packages", "dist-packages"}


def is_from_library(function: Any) -> bool:
    """Return whether PyTorch, a library of Hugging Face or this package defines a function.

    Where it was written counts, and not its `__module__`, which `functools.wraps` takes over. So
    does where a function was written that it wraps: `torch.no_grad()` decorates its user's.
    """
    return all(map(_is_librarys, parts_of(function)))


def is_installed(function: Any) -> bool:
    """Return whether a function, and all that it wraps, came with a package or a model's files."""
    return all(map(_is_installed, parts_of(function)))


def described(function: Any) -> str:
    """Return the module and the name of a function, as it was written.

    Of a library's function that wraps its user's, the user's is described.
    """
    parts = [*parts_of(function)]
    part = next((each for each in parts if not _is_librarys(each)), parts[0])
    name = part.__code__.co_qualname if isinstance(part, FunctionType) else type(part).__qualname__
    return f"{_module(part)}.{name}"


def parts_of(function: Any) -> Iterator[Any]:
    """Yield what was written: a function, and those inside it that decorators keep, from outside.

    Partial functions, methods and what `torch.compile` returns are only around what was written.
    """
    seen: set[int] = set()
    following = [function]
    while following:
        function = following.pop()
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        around = _inside(function)
        if around is None:
            yield function
        following += [getattr(function, "__dict__", {}).get("__wrapped__"), around]


def uncompiled(function: Any) -> Any:
    """Return the function inside `torch.compile`."""
    inside = getattr(function, "_torchdynamo_orig_callable", None)  # `functools.wraps` copies it to what somebody else wrote
    return function if inside is None or not _is_librarys(getattr(function, "__func__", function)) else inside


def _inside(function: Any) -> Any | None:
    """Return what a partial function, a method or a compiled function calls, else `None`."""
    if isinstance(function, functools.partial):
        return function.func
    if isinstance(function, MethodType):
        return function.__func__
    inside = uncompiled(function)
    return None if inside is function else inside


def _is_librarys(part: Any) -> bool:
    return f"{_module(part)}.".startswith(_LIBRARIES)


def _is_installed(part: Any) -> bool:
    if _is_librarys(part) or f"{_module(part)}.".startswith(_CODE_OF_MODELS):
        return True
    return isinstance(part, FunctionType) and not _INSTALLED.isdisjoint(PurePath(part.__code__.co_filename).parts)


def _module(part: Any) -> Any:
    return part.__globals__.get("__name__") if isinstance(part, FunctionType) else type(part).__module__
