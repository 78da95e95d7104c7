"""The state of a model in memory, so that a cache is continued only by the model that filled it.

`ModelState.of` records the active adapters, the settings, every module's class and numbers, and of
every tensor the object, its storage, its version and a sample of its content. `difference`
describes what has changed since. `difference_of_code` does so for hooks and replaced forwards, of
which nobody can say whether they change a result. Only content counts: a tensor that moved, was
written to, or belongs to another model is equal if a digest of all its elements is. A write that
PyTorch does not count (`tensor.data`) is detected by the sample. Of tensors in attributes of users'
modules (`held_tensors`) there is only the sample.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from specache.model.identity.adapters import LayerAdapters
from specache.model.identity.code import Code, code_of
from specache.model.identity.held_tensors import held_tensors
from specache.model.identity.model_settings import relevant_settings
from specache.model.identity.tensor_marks import TensorMark, difference_of_tensors, remember, remember_after_run
from specache.model.identity.tensors import Layer, changes_with_length, layers
from specache.model.identity.wrappers import unwrapped

_Facts = tuple[str, tuple[tuple[str, Any], ...]]  # (class; numbers, strings and tensors in attributes) of a module
_HOW_IT_RUNS = re.compile("checkpoint|name_or_path|seq_len_cached")  # in names of attributes that change no result
_PLAIN = {bool, int, float, str}
# they have at most the shape of weights
_WITHOUT_NUMBERS = {nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Identity, nn.Linear, nn.SiLU}


class ModelState:
    """The state of a model when a cache was filled. It holds a weak reference to the model."""

    def __init__(
        self,
        model: nn.Module,
        settings: dict[str, Any],
        adapters: dict[str, LayerAdapters],
        modules: dict[str, _Facts],
        code: dict[str, Code],
        tensors: dict[str, TensorMark],
        noted: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        self._model = weakref.ref(model)
        self._settings = settings
        self._adapters = adapters
        self._modules = modules
        self._code = code
        self._tensors = tensors
        self._noted = noted  # (module, number) that a run changes: layers record there that they have run

    @classmethod
    def of(cls, model: Any) -> ModelState:
        """Record the state of a model.

        The first time takes one pass over its weights, about what a decode step reads.
        """
        model = unwrapped(model)
        found = list(layers(model))
        return cls(model, relevant_settings(model), _adapters(found), _modules(found), _code(found), remember(found, model))

    def after_run(self, model: Any) -> ModelState:
        """Return the state with the changes that a run itself makes.

        Some layers pack their weights when they first run. Changes by anyone else meanwhile remain
        differences.
        """
        model = unwrapped(model)
        found = list(layers(model))
        modules = _modules(found)
        noted = self._noted | frozenset(_changed_numbers(self._modules, modules))
        modules.update(
            (name, facts) for name, facts in self._modules.items() if name not in modules or modules[name][0] != facts[0]
        )
        code, now = dict(self._code), _code(found)
        code.update((name, now[name]) for name in code.keys() & now.keys() if _kinds(code[name]) == _kinds(now[name]))
        tensors = remember_after_run(found, model, self._tensors)
        return ModelState(model, self._settings, self._adapters, modules, code, tensors, noted)

    def is_of(self, model: Any) -> bool:
        """Return True if the state is of this model object, changed or not."""
        return self._model() is unwrapped(model)

    def difference(self, model: Any) -> str | None:
        """Return a description of what differs from this state, or None."""
        model = unwrapped(model)
        found = list(layers(model))
        return (
            _difference_of_adapters(self._adapters, _adapters(found))
            or _difference_of_settings(self._settings, relevant_settings(model))
            or _difference_of_modules(self._modules, _modules(found), self._noted)
            or difference_of_tensors(self._tensors, found, model)
        )

    def difference_of_code(self, model: Any) -> str | None:
        """Return which hook or forward differs from this state, or None."""
        now = _code(list(layers(unwrapped(model))))
        for name in {**self._code, **now}:
            was, has = self._code.get(name, ()), now.get(name, ())
            if was != has:
                what = next(mark[0] for mark in (*has, *was) if mark not in was or mark not in has)
                return f"{what} was put on its module {name}, changed or removed"
        return None


# Adapters, settings, modules


def _adapters(found: list[Layer]) -> dict[str, LayerAdapters]:
    adapted = ((layer.name, layer.adapters) for layer in found if layer.adapters is not None)
    return {name: adapters for name, adapters in adapted if adapters.active or adapters.merged}


def _difference_of_adapters(before: dict[str, LayerAdapters], now: dict[str, LayerAdapters]) -> str | None:
    if before == now:
        return None
    was, has = (_adapter_text(each) for each in (before, now))
    if was != has:
        return f"it ran with {was} then and runs with {has} now"
    name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
    was, has = (_adapter_text({name: each[name]} if name in each else {}) for each in (before, now))
    if was != has:
        return f"its layer {name} ran with {was} then and runs with {has} now"
    return f"the adapters of its layer {name} have other scales"


def _adapter_text(found: dict[str, LayerAdapters]) -> str:
    active = sorted({name for one in found.values() for name in one.active})
    merged = sorted({name for one in found.values() for name in one.merged})
    said = [f"the adapter {name!r}" for name in active] + [f"the adapter {name!r} merged into its weights" for name in merged]
    return " and ".join(said) or "no active adapter"


def _difference_of_settings(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            return f"its config.{name} was {before.get(name)} and is {now.get(name)}"
    return None


def _modules(found: list[Layer]) -> dict[str, _Facts]:
    """Return the facts of modules by name, except the root and adapted layers.

    The scales of adapted layers are compared instead.
    """
    facts: dict[str, _Facts] = {}
    for layer in found[1:]:
        if layer.adapters is None:
            kind = type(layer.module)
            numbers = () if changes_with_length(layer.module) else _numbers(layer.module)
            facts[layer.name] = (f"{kind.__module__}.{kind.__qualname__}", numbers)
    return facts


def _code(found: list[Layer]) -> dict[str, Code]:
    """Return the code of modules that have some beside their classes', by name."""
    return {layer.name: code for layer in found if (code := code_of(layer.module))}


def _kinds(code: Code) -> list[tuple[str, Any]]:
    """Return code without the values that it encloses, which a run may change."""
    return [(what, function) for what, function, _ in code]


def _numbers(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    if type(module) in _WITHOUT_NUMBERS:
        return ()
    own = [(name, value) for name, value in vars(module).items() if type(value) in _PLAIN and name[0] != "_"]
    own += held_tensors(module)
    return tuple(pair for pair in own if pair[0] != "training" and not _HOW_IT_RUNS.search(pair[0]))


def _changed_numbers(before: dict[str, _Facts], now: dict[str, _Facts]) -> Iterator[tuple[str, str]]:
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            numbers, others = dict(before[name][1]), dict(now[name][1])
            yield from ((name, key) for key in {*numbers, *others} if numbers.get(key) != others.get(key))


def _difference_of_modules(before: dict[str, _Facts], now: dict[str, _Facts], noted: frozenset[tuple[str, str]]) -> str | None:
    if before == now:
        return None
    for name in {**before, **now}:
        was, has = before.get(name), now.get(name)
        if was is None or has is None:
            return f"its module {name} {'is new' if was is None else 'is gone'}"
        if was[0] != has[0]:
            return f"its module {name} was a {was[0].rpartition('.')[2]} and is a {has[0].rpartition('.')[2]}"
        numbers, others = dict(was[1]), dict(has[1])
        for key in sorted({*numbers, *others}):
            if numbers.get(key) != others.get(key) and (name, key) not in noted:
                return f"{name}.{key} was {numbers.get(key)} and is {others.get(key)}"
    return None
