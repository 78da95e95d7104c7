"""The session of methods that use transformers' own caches.

The stock model decodes, with the attention implementation that the user had set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.engine.attention_hook import reset_rope
from specache.eval.methods.base import SessionStats
from specache.eval.prefilled import Prefilled


class StockSession:
    """Decodes with a transformers cache that holds the prompt.

    Args:
        fast_bytes: returns the bytes of a cache in fast memory. It is called after every step, and
            the most counts.

    Attributes:
        cache: the cache, until the session is closed.
    """

    def __init__(self, prompt: Prefilled, cache: Any, fast_bytes: Callable[[Any], int]) -> None:
        self._model = prompt.model
        self._info = prompt.cache.info
        self.cache = cache
        self._fast_bytes = fast_bytes
        self._length = prompt.length
        self._token_bytes = prompt.token_bytes
        self._held = fast_bytes(cache)

    def feed(self, token: int) -> Tensor:
        reset_rope(self._model, self._info)
        ids = torch.tensor([[token]], device=self._info.device)
        positions = torch.full_like(ids, self._length)
        output = self._model(ids, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._length += 1
        self._held = max(self._held, self._fast_bytes(self.cache))
        return output.logits[0, -1].float()

    def stats(self) -> SessionStats:
        return SessionStats(self._held / (self._token_bytes * self._length))

    def close(self) -> None:
        self.cache = None


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested containers and tensor subclasses.

    Floating-point tensors count at 16 bits in any dtype.
    """
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        size = value.element_size()
        return value.numel() * (min(size, ORDINARY_ITEMSIZE) if value.is_floating_point() else size)
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    return 0
