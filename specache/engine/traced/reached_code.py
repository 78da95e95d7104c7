"""Which functions a layer's code calls, as far as one can tell without running it.

A program does not notice when one of them is replaced. So a layer that calls somebody else's is not
recorded, and those that it calls are compared before every answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

# packages whose functions a program may stand for
_KNOWN = {"torch", "transformers", "specache"} | sys.stdlib_module_names


class ReachedCode:
    """The functions that the code of these classes of modules reaches.

    Attributes:
        foreign: the name of one that is somebody else's, or `None`.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self.foreign: str | None = None
        self._found: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        self._walked: set[int] = set()
        for kind in kinds:
            for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
                names = vars(base)  # a view, which shows later changes
                for name, value in names.items():
                    if callable(value) or isinstance(value, staticmethod | classmethod | property):
                        self._add(names, name, value)

    def is_unchanged(self) -> bool:
        """Return whether the same functions are reached as when this was made."""
        return all(owner.get(name) is value for owner, name, value in self._found.values())

    def _add(self, owner: Any, name: str, value: Any) -> None:
        if (id(owner), name) in self._found:
            return
        self._found[id(owner), name] = owner, name, value
        for function in _functions_of(value):
            self._walk(function)

    def _walk(self, function: FunctionType) -> None:
        if id(function) in self._walked:
            return
        self._walked.add(id(function))
        self.foreign = self.foreign or somebody_elses(function)
        names = list(_names(function.__code__))
        if _package(function) == "transformers":  # what PyTorch's own code calls has too many names
            for name in names:
                value = function.__globals__.get(name)
                if isinstance(value, FunctionType):
                    self._add(function.__globals__, name, value)
        self._add_from_modules(function, names)

    def _add_from_modules(self, function: FunctionType, names: list[str]) -> None:
        """Add functions that are reached through a module: `nn.functional.silu`."""
        modules = [value for name in names if isinstance(value := function.__globals__.get(name), ModuleType)]
        for module in modules:
            for name in names:
                value = vars(module).get(name)
                if isinstance(value, ModuleType) and value not in modules and value.__name__.partition(".")[0] == "torch":
                    modules.append(value)
                elif callable(value):
                    self._found.setdefault((id(vars(module)), name), (vars(module), name, value))
                    self.foreign = self.foreign or somebody_elses(value)


def somebody_elses(value: Any) -> str | None:
    """Return the name of a function that is none of PyTorch's, transformers', ours or Python's."""
    value = getattr(value, "func", value)  # of a partial function
    value = getattr(value, "__func__", value)
    return (
        f"{value.__qualname__} of {value.__module__}" if isinstance(value, FunctionType) and _package(value) not in _KNOWN else None
    )


def _package(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__", "")).partition(".")[0]


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """Yield the functions of a value, with those that decorators keep."""
    for each in (value, getattr(value, "__func__", None), getattr(value, "fget", None), getattr(value, "__wrapped__", None)):
        if isinstance(each, FunctionType):
            yield each
            for cell in each.__closure__ or ():
                try:
                    inside = cell.cell_contents
                except ValueError:  # still empty
                    continue
                if isinstance(inside, FunctionType) and inside is not each:
                    yield inside


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
