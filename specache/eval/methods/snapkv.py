"""SnapKV (Li et al., 2024): keep the prompt tokens that its last queries attend to most.

The tokens are selected once, when the prompt ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from specache.errors import ConfigError
from specache.eval.methods.dense_cache import DenseMethod, KeptRows, LayerState, attention_weights, rows_on_device
from specache.eval.prefilled import OBSERVATION_WINDOW, Prefilled
from specache.kernels.types import AttentionParams

POOLING = ("max", "avg")


class SnapKVLayer(LayerState):
    """The selected rows of the prompt, and every later token."""

    def __init__(self, rows: KeptRows, positions: Tensor) -> None:
        self._rows = rows
        self.positions = positions  # [Hkv, m], of the prompt

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        self._rows.append(keys, values)
        return self._rows.attend(query, params)


@dataclass(frozen=True)
class SnapKVMethod(DenseMethod):
    """The observation window and, per KV head, the earlier tokens with the most votes.

    A token's vote is the attention it gets from the window's queries, averaged over them and over
    the query heads that share its KV head (the paper has one KV head per query head). Votes are
    then pooled over neighbours, so that whole phrases stay. Window 32 and max pooling over 7 are
    the paper's settings on LongBench; `pooling=avg` over 5 is the default of the authors' code. The
    budget applies to the prompt: all decoded tokens are kept in addition.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "SnapKV: prompt tokens that the last queries of the prompt look at, and all later ones"
    needs_all_queries: ClassVar[bool] = False
    window: int = field(default=32, metadata={"help": "newest prompt tokens, whose queries vote"})
    kernel_size: int = field(default=7, metadata={"help": "neighbours that share a vote, odd"})
    pooling: str = field(default="max", metadata={"help": "how they share it: max or avg"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.window <= OBSERVATION_WINDOW:
            raise ConfigError(f"window is between 1 and {OBSERVATION_WINDOW} tokens, got {self.window}.")
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size is odd, got {self.kernel_size}.")
        if self.pooling not in POOLING:
            raise ConfigError(f"pooling is one of {', '.join(POOLING)}, got {self.pooling!r}.")

    def layer(self, prompt: Prefilled, index: int) -> SnapKVLayer:
        keys, values = rows_on_device(prompt, index)
        capacity = min(self.capacity(prompt, least=1), prompt.length)
        window = min(self.window, capacity)
        older = prompt.length - window
        positions = torch.arange(prompt.length, device=keys.device).expand(keys.shape[0], -1)  # [Hkv, S]
        if capacity < prompt.length:
            votes = self._votes(prompt.queries(index)[:, -window:], keys, prompt.params[index])
            chosen = votes.topk(capacity - window, dim=1).indices.sort(dim=1).values
            positions = torch.cat([chosen, positions[:, older:]], dim=1)  # [Hkv, capacity]
        return SnapKVLayer(KeptRows.of(keys, values, positions), positions)

    def _votes(self, query: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
        """Return the votes [Hkv, S - window] for the tokens before the window.

        Args:
            query: [Hq, window, D] of the window.
            keys: [Hkv, S, D].
        """
        older = keys.shape[1] - query.shape[1]
        weights = attention_weights(query, keys, params)[..., :older]  # [Hkv, G, window, S - window]
        votes = weights.mean(dim=(1, 2))
        pool = max_pool1d if self.pooling == "max" else avg_pool1d
        return pool(votes.unsqueeze(1), self.kernel_size, stride=1, padding=self.kernel_size // 2).squeeze(1)
