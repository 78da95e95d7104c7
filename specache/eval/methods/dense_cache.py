"""The base of methods that keep exact rows and evict or offload the rest: session, budget, memory.

Such a method decodes one row per step. Sliding layers run over copies of the prompt's windows.
Every full-attention layer has a `LayerState` with the rows that the method keeps. Rows are counted
at 16 bits whatever dtype the model runs in, so a budget keeps the same number of rows in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from specache.attention.decode import StepKind
from specache.attention.dense import attend_part, merge
from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.engine.attention_hook import forward, reset_rope
from specache.errors import ConfigError, EvaluationError
from specache.eval.methods.base import Method, SessionStats
from specache.eval.prefilled import Prefilled
from specache.kernels.finite import check_finite
from specache.kernels.torch.exact import scores
from specache.kernels.types import AttentionParams


class LayerState(ABC):
    """One full-attention layer of one sequence.

    Attributes:
        needed: rows needed from the store of recently fetched rows.
        hits: needed rows that were already there.
    """

    needed: int = 0
    hits: int = 0

    @abstractmethod
    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Take one token and attend over the kept rows.

        Args:
            query: [Hq, 1, D].
            keys, values: [Hkv, 1, D].

        Returns:
            float32 [Hq, 1, D].
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes kept in fast memory, rows at 16 bits."""

    @property
    def hot_nbytes(self) -> int:
        """Return the bytes of the store of recently fetched rows."""
        return 0


class KeptRows:
    """Exact keys and values [Hkv, m, D], the same number for every KV head.

    Their order is free: RoPE has put the position into the keys.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys.contiguous()
        self.values = values.contiguous()

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor) -> KeptRows:
        """Return the rows of keys and values [Hkv, S, D] at positions [Hkv, m]."""
        return cls(take_rows(keys, positions), take_rows(values, positions))

    @property
    def count(self) -> int:
        """Return `m`, the rows per KV head."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the bytes at 16 bits."""
        return ORDINARY_ITEMSIZE * (self.keys.numel() + self.values.numel())

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append n rows [Hkv, n, D]."""
        self.keys = torch.cat([self.keys, keys], dim=1)
        self.values = torch.cat([self.values, values], dim=1)

    def overwrite(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write one row [Hkv, 1, D] into each head's slot [Hkv]."""
        heads = torch.arange(len(slots), device=slots.device)
        self.keys[heads, slots] = keys[:, 0]
        self.values[heads, slots] = values[:, 0]

    def attend(self, query: Tensor, params: AttentionParams) -> Tensor:
        """Attend with query [Hq, 1, D] over the rows -> [Hq, 1, D]."""
        return merge([attend_part(query, self.keys, self.values, params)], params.sinks)[0]


class DenseSession:
    """Decodes after a prompt with one `LayerState` per full-attention layer.

    Args:
        layer: makes the state of a layer from its index.

    Attributes:
        layers: the state of each full-attention layer.
    """

    def __init__(self, prompt: Prefilled, layer: Callable[[int], LayerState]) -> None:
        self._model = prompt.model
        self._info = prompt.cache.info
        self._length = prompt.length
        self.layers = {index: layer(index) for index in prompt.full_layers}
        self._pass = _DensePass(self.layers, prompt)
        self._token_bytes = prompt.token_bytes
        self._held = self._held_hot = 0
        self._measure()

    def feed(self, token: int) -> Tensor:
        position = self._length
        if self._info.rope_type == "longrope" and self._info.rope_side(position - 1) != self._info.rope_side(position):
            raise EvaluationError(
                f"Position {position} is where this model's RoPE switches to its long factors, which makes all keys kept so far "
                "meaningless. Use a prompt that is longer than that, or so much shorter that the answer ends before it."
            )
        reset_rope(self._model, self._info)
        ids = torch.tensor([[token]], device=self._info.device)
        logits = forward(self._model, ids, torch.full_like(ids, position), self._pass, logits=1)
        self._length += 1
        self._measure()
        return logits[0, -1]

    def stats(self) -> SessionStats:
        """Return the most bytes held so far over the ordinary cache's present bytes."""
        ordinary = self._token_bytes * self._length
        needed = sum(layer.needed for layer in self.layers.values())
        hits = sum(layer.hits for layer in self.layers.values())
        return SessionStats(self._held / ordinary, self._held_hot / ordinary, hits / needed if needed else None)

    def close(self) -> None:
        self._measure()
        self.layers.clear()
        self._pass.windows.clear()

    def _measure(self) -> None:
        layers = self.layers.values()
        self._held = max(self._held, sum(layer.nbytes for layer in layers))
        self._held_hot = max(self._held_hot, sum(layer.hot_nbytes for layer in layers))


class _DensePass:
    """Computes every attention layer of a step (see `forward_pass.ForwardPass`)."""

    def __init__(self, layers: dict[int, LayerState], prompt: Prefilled) -> None:
        self.layers = layers
        self.windows = prompt.windows()

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Attend with query [1, Hq, 1, D], keys and values [1, Hkv, 1, D] -> [1, 1, Hq, D]."""
        if index in self.windows:
            out = self.windows[index].decode(query[0], keys[0], values[0], params, StepKind.SINGLE)
        else:
            check_finite(keys, values, index)
            out = self.layers[index].decode(query[0], keys[0], values[0], params)
        return out.transpose(0, 1)[None].to(query.dtype)


@dataclass(frozen=True)
class DenseMethod(Method):
    """A method that keeps exact rows within a budget. Its fields are its settings."""

    budget: float = field(
        default=0.25, metadata={"help": "bytes it may keep in fast memory, as a fraction of the prompt's ordinary 16-bit cache"}
    )

    def __post_init__(self) -> None:
        if not self.budget > 0:
            raise ConfigError(f"budget is a fraction of the 16-bit cache above 0, got {self.budget}.")
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, int) and value < 0:
                raise ConfigError(f"{name} must not be negative, got {value}.")

    def start(self, prompt: Prefilled) -> DenseSession:
        return DenseSession(prompt, lambda index: self.layer(prompt, index))

    @abstractmethod
    def layer(self, prompt: Prefilled, index: int) -> LayerState:
        """Return the state of a full-attention layer after the prompt."""

    def capacity(self, prompt: Prefilled, least: int) -> int:
        """Return the rows per KV head that the budget allows, at least `least`."""
        return max(least, int(self.budget * prompt.length))


def rows_on_device(prompt: Prefilled, index: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [Hkv, S, D] of a layer on the model's device."""
    keys, values = prompt.rows(index)
    return keys.to(prompt.cache.info.device), values.to(prompt.cache.info.device)


def take_rows(rows: Tensor, positions: Tensor) -> Tensor:
    """Return rows [Hkv, S, D] at positions [Hkv, m] -> [Hkv, m, D]."""
    return rows.gather(1, positions.unsqueeze(-1).expand(-1, -1, rows.shape[2]))


def attention_weights(query: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
    """Return causal probabilities [Hkv, G, n, T] of the newest n of T tokens, sinks included.

    Args:
        query: [Hq, n, D], of the last n tokens.
        keys: [Hkv, T, D].
    """
    score = scores(query, keys, params)  # [Hkv, G, n, T]
    n, length = score.shape[2:]
    if n > 1:
        row = torch.arange(length - n, length, device=score.device)[:, None]
        score.masked_fill_(row < torch.arange(length, device=score.device), -torch.inf)
    lse = score.logsumexp(-1, keepdim=True)
    if params.sinks is not None:
        lse = torch.logaddexp(lse, params.sinks.float().reshape(*score.shape[:2], 1, 1))
    return score.sub_(lse).exp_()
