"""StreamingLLM (Xiao et al., 2023): the first few tokens (attention sinks) and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from specache.eval.methods.dense_cache import DenseMethod, KeptRows, LayerState, rows_on_device
from specache.eval.prefilled import Prefilled
from specache.kernels.types import AttentionParams


class StreamingLLMLayer(LayerState):
    """Sinks, followed by a ring of the newest tokens.

    Args:
        rows: the first `sinks` tokens and the newest ones, in order.
        capacity: rows kept at most, sinks included.
    """

    def __init__(self, rows: KeptRows, sinks: int, capacity: int) -> None:
        self._rows = rows
        self._sinks = sinks
        self._capacity = capacity
        self._next = 0  # slot of the oldest token in the ring

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        if self._rows.count < self._capacity:
            self._rows.append(keys, values)
        else:
            slot = self._sinks + self._next
            self._rows.overwrite(torch.full((keys.shape[0],), slot, device=keys.device), keys, values)
            self._next = (self._next + 1) % (self._capacity - self._sinks)
        return self._rows.attend(query, params)


@dataclass(frozen=True)
class StreamingLLMMethod(DenseMethod):
    """Sinks and recent tokens, a constant number of rows.

    The authors number positions within the cache, which lets a model go past its longest context.
    Here the kept keys keep their positions in the text, as RoPE left them, so distances within the
    model's context stay true.
    """

    name: ClassVar[str] = "streaming-llm"
    summary: ClassVar[str] = "StreamingLLM: the first tokens and the newest ones"
    needs_all_queries: ClassVar[bool] = False
    sinks: int = field(default=4, metadata={"help": "first tokens that are always kept"})

    def layer(self, prompt: Prefilled, index: int) -> StreamingLLMLayer:
        keys, values = rows_on_device(prompt, index)
        capacity = self.capacity(prompt, least=self.sinks + 1)
        positions = torch.arange(prompt.length, device=keys.device)
        if capacity < prompt.length:
            positions = torch.cat([positions[: self.sinks], positions[prompt.length - capacity + self.sinks :]])
        return StreamingLLMLayer(KeptRows(keys[:, positions], values[:, positions]), self.sinks, capacity)
