"""How much memory tensors take at most inside a block of code."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of every storage that operations return, until no tensor uses it.

    `peak` is the most at once.

    Args:
        beside: the bytes of memory that no tensor has, which are added.
    """

    def __init__(self, beside: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self._beside = beside
        self.peak = 0
        self._live = 0
        self._holders: dict[int, int] = {}  # storage address -> live tensors on it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor, known)
        return result

    def _track(self, tensor: torch.Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in known and address not in self._holders:
            return  # it existed before
        if address not in self._holders:
            self._live += size
            self.peak = max(self.peak, self._live + self._beside())
        self._holders[address] = self._holders.get(address, 0) + 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self._live -= size
