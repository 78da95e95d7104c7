"""Whether a function that a model calls is a library's, or its user's."""

from __future__ import annotations

import functools
from pathlib import PurePath
from types import FunctionType, MethodType
from typing import Any

_LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.", "kernels.", "specache.")
_CODE_OF_MODELS = "transformers_modules."  # that came with a model's files
_INSTALLED = {"site-packages", "dist-packages"}


def is_from_library(function: Any) -> bool:
    """Return whether PyTorch, a library of Hugging Face or this package defines a function.

    Where it was written counts, and not its `__module__`, which `functools.wraps` takes over.
    """
    return f"{_module(_innermost(function))}.".startswith(_LIBRARIES)


def is_installed(function: Any) -> bool:
    """Return whether a function came with an installed package or a model's files."""
    function = _innermost(function)
    if is_from_library(function) or f"{_module(function)}.".startswith(_CODE_OF_MODELS):
        return True
    return isinstance(function, FunctionType) and not _INSTALLED.isdisjoint(PurePath(function.__code__.co_filename).parts)


def described(function: Any) -> str:
    """Return the module and the name of a function, as it was written."""
    function = _innermost(function)
    name = function.__code__.co_qualname if isinstance(function, FunctionType) else type(function).__qualname__
    return f"{_module(function)}.{name}"


def _innermost(function: Any) -> Any:
    """Return the function inside `torch.compile`, partial functions and methods."""
    function = uncompiled(function)
    while isinstance(function, functools.partial | MethodType):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return function


def uncompiled(function: Any) -> Any:
    """Return the function inside `torch.compile`."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def _module(function: Any) -> Any:
    if isinstance(function, FunctionType):
        return function.__globals__.get("__name__")
    return type(function).__module__
