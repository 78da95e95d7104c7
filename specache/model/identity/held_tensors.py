"""Tensors in the attributes of a user's module that are neither parameters nor buffers.

Scripts for steering keep their vectors so, in a wrapper around a layer: as an attribute, in a
dictionary by name, or in an object with settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from specache.model.function_origin import is_installed
from specache.model.identity.samples import spread
from specache.model.identity.tensors import plain_tensors

_INTERNAL = frozenset((*nn.Module().__dict__, "config"))
_DEEPEST = 2  # containers and objects in each other
_MOST = 64  # entries of a container that are looked at


@dataclass(frozen=True)
class HeldTensors:
    """What an attribute holds.

    Attributes:
        entries: the number of entries of a container, 1 of anything else.
        found: (path, shape, dtype, sample) of its tensors.
    """

    entries: int
    found: tuple[tuple[str, tuple[int, ...], torch.dtype, bytes], ...]

    def __str__(self) -> str:
        kinds = [f"{str(dtype).removeprefix('torch.')} {list(shape)}" for _, shape, dtype, _ in self.found]
        digest = hashlib.sha256(b"".join(sample for *_, sample in self.found)).hexdigest()
        return f"{', '.join(kinds)} (sha256 of a sample: {digest[:8]})"


def held_tensors(module: nn.Module) -> Iterator[tuple[str, HeldTensors]]:
    """Yield (name, what it holds) of attributes with tensors, if the module's class is a user's."""
    if is_installed(type(module).forward):
        return
    for name, value in vars(module).items():
        if name not in _INTERNAL:
            tensors = [*_tensors_in(value, "", _DEEPEST)]
            if tensors:
                samples = spread([tensor for _, tensor in tensors], [False] * len(tensors))
                found = ((path, tuple(t.shape), t.dtype, s) for (path, t), s in zip(tensors, samples, strict=True))
                yield name, HeldTensors(len(value) if isinstance(value, dict | list | tuple) else 1, tuple(found))


def _tensors_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield from ((path + suffix, plain) for suffix, plain in plain_tensors(value) if not plain.is_meta)
    elif depth and not isinstance(value, nn.Module | type) and not callable(value):
        for key, entry in islice(_entries(value), _MOST):
            yield from _tensors_in(entry, f"{path}.{key}", depth - 1)


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, list | tuple):
        yield from enumerate(value)
    else:
        yield from tuple((value if isinstance(value, dict) else getattr(value, "__dict__", {})).items())
