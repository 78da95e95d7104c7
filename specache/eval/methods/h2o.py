"""H2O (Zhang et al., 2023): the tokens with the most accumulated attention, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.errors import ConfigError
from specache.eval.methods.dense_cache import DenseMethod, KeptRows, LayerState, attention_weights, rows_on_device
from specache.eval.prefilled import Prefilled
from specache.kernels.types import AttentionParams
from specache.model.dimensions import row_bytes

QUERY_BLOCK = 128  # prompt queries scored at a time
BOOKKEEPING_BYTES = 8  # per kept row: accumulated attention (float32) and position (int32)


class H2OLayer(LayerState):
    """Kept rows with the attention that each has accumulated.

    Args:
        keys, values: [Hkv, S, D] of the prompt.
        attention_sums: accumulated attention [Hkv, S] of its tokens.
        capacity: rows kept at most per KV head.
        recent: newest tokens, which are always kept.

    Attributes:
        positions: the kept positions [Hkv, m], in no order.
        attention_sums: what each of them has accumulated, [Hkv, m].
    """

    def __init__(self, keys: Tensor, values: Tensor, attention_sums: Tensor, capacity: int, recent: int) -> None:
        heads, self._length = attention_sums.shape
        self._capacity = capacity
        self.recent = recent
        positions = torch.arange(self._length, device=keys.device).expand(heads, -1)  # [Hkv, S]
        if capacity < self._length:
            older = self._length - recent
            heavy = attention_sums[:, :older].topk(capacity - recent, dim=1).indices.sort(dim=1).values
            positions = torch.cat([heavy, positions[:, older:]], dim=1)  # [Hkv, capacity]
        self._rows = KeptRows.of(keys, values, positions)
        self.attention_sums = attention_sums.gather(1, positions)
        self.positions = positions.int()

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + self.attention_sums.nbytes + self.positions.nbytes

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        self._store(keys, values)
        weights = attention_weights(query, self._rows.keys, params)[:, :, 0]  # [Hkv, G, m]
        self.attention_sums += weights.mean(1)
        return (weights @ self._rows.values.float()).flatten(0, 1).unsqueeze(1)  # [Hq, 1, D]

    def _store(self, keys: Tensor, values: Tensor) -> None:
        """Store a token. A full layer evicts the least attended token that is not recent."""
        position = self._length
        self._length += 1
        if self._rows.count < self._capacity:
            self._rows.append(keys, values)
            self.attention_sums = torch.nn.functional.pad(self.attention_sums, (0, 1))
            self.positions = torch.nn.functional.pad(self.positions, (0, 1), value=position)
            return
        is_recent = self.positions > position - self.recent
        slots = self.attention_sums.masked_fill(is_recent, torch.inf).argmin(1)  # [Hkv]
        self._rows.overwrite(slots, keys, values)
        self.attention_sums[torch.arange(len(slots)), slots] = 0
        self.positions[torch.arange(len(slots)), slots] = position


@dataclass(frozen=True)
class H2OMethod(DenseMethod):
    """Heavy hitters and recent tokens, a constant number of rows. Every step evicts one row.

    Attention is accumulated over all queries of the prompt under exact attention, then over the
    decoded ones, and averaged over the query heads that share a KV head. The start costs the
    prompt's attention a second time, with all probabilities.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "H2O: the tokens with the most accumulated attention and the newest ones"
    needs_all_queries: ClassVar[bool] = True
    recent_share: float = field(default=0.5, metadata={"help": "part of the kept rows that goes to the newest tokens"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_share <= 1:
            raise ConfigError(f"recent_share is between 0 and 1, got {self.recent_share}.")

    def layer(self, prompt: Prefilled, index: int) -> H2OLayer:
        keys, values = rows_on_device(prompt, index)
        row = row_bytes(1, keys.shape[2], ORDINARY_ITEMSIZE)
        rows = int(self.budget * prompt.length * row / (row + BOOKKEEPING_BYTES))
        capacity = max(2, rows)
        recent = min(max(1, int(capacity * self.recent_share)), capacity)
        attention_sums = accumulated_attention(prompt.queries(index), keys, prompt.params[index])
        return H2OLayer(keys, values, attention_sums, capacity, recent)


def accumulated_attention(query: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
    """Return the attention of each prompt token, summed over all its queries [Hq, S, D].

    Returns:
        [Hkv, S], the mean over a KV head's query heads.
    """
    heads, length = keys.shape[:2]
    attention_sums = torch.zeros(heads, length, device=keys.device)
    for first in range(0, length, QUERY_BLOCK):
        stop = min(first + QUERY_BLOCK, length)
        weights = attention_weights(query[:, first:stop], keys[:, :stop], params)  # [Hkv, G, n, stop]
        attention_sums[:, :stop] += weights.sum(2).mean(1)
    return attention_sums
