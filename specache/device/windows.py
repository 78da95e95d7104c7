"""The sliding-window layers of a batch that decodes: the sequences' rings in one tensor per layer.

A token's slot is its position modulo the window. The slots that a query sees follow from its
position, a number on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specache.attention.decode import StepKind
from specache.cache.window_layer import WindowLayer
from specache.kernels.torch.exact import add_sinks, softmax_sum
from specache.kernels.torch.exact import scores as exact_scores
from specache.kernels.types import AttentionParams


@dataclass
class WindowState:
    """One sliding layer of `B` sequences.

    Attributes:
        layers: the layer of each sequence.
        ring: [B, 2, Hkv, window, D], keys and values.
        finite: bool [], whether keys and values of the last step's real token were finite.
    """

    layers: list[WindowLayer]
    ring: Tensor
    finite: Tensor

    @classmethod
    def of(cls, layers: Sequence[WindowLayer], finite: Tensor) -> WindowState:
        """Return the state of a layer. Rings are not moved into it yet."""
        return cls(list(layers), torch.zeros_like(layers[0].ring.expand(len(layers), *layers[0].ring.shape)), finite)

    @property
    def window(self) -> int:
        return self.ring.shape[3]

    def attach(self) -> None:
        """Move the layers' rings into the batch's ring."""
        for layer, ring in zip(self.layers, self.ring, strict=True):
            layer.move_ring(ring)

    def detach(self) -> None:
        """Move the rings back into buffers of the layers."""
        for layer, ring in zip(self.layers, self.ring, strict=True):
            layer.move_ring(torch.empty_like(ring))

    def commit(self) -> None:
        """Count the step's real token."""
        for layer in self.layers:
            layer.length += 1

    def attention(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, hidden: Tensor, params: AttentionParams
    ) -> Tensor:
        """Append the real token to the ring, and attend exactly within the window.

        Args:
            query: [B, Hq, n, D]; keys, values: [B, Hkv, n, D].
            positions: int64 [B] of the real tokens.
            hidden: the result of `hidden_slots` for this window.

        Returns:
            [B, Hq, n, D].
        """
        self._append(keys, values, positions)
        seen_keys = torch.cat([self.ring[:, 0], keys[:, :, 1:]], dim=2)  # [B, Hkv, T, D]
        seen_values = torch.cat([self.ring[:, 1], values[:, :, 1:]], dim=2)
        if params.softcap is None and params.sinks is None:
            return _fused(query, seen_keys, seen_values, hidden, params.scaling)
        batch = len(query)
        score = exact_scores(query.flatten(0, 1), seen_keys.flatten(0, 1), params).unflatten(0, (batch, -1))
        score.masked_fill_(hidden, -torch.inf)  # [B, Hkv, G, n, T]
        shape = score.shape[:4]
        out, lse = softmax_sum(score.flatten(0, 1), seen_values.flatten(0, 1))
        own_lse = lse.view(shape)
        share = (own_lse - add_sinks(own_lse, params)).exp()
        return (out.view(*shape, -1) * share.unsqueeze(-1)).flatten(1, 2)

    def _append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Append the real token to the ring, and record whether it is finite."""
        new = torch.stack([keys[:, :, 0], values[:, :, 0]], dim=1)  # [B, 2, Hkv, D]
        self.finite.copy_(torch.isfinite(new).all())
        slot = (positions % self.window).view(-1, 1, 1, 1, 1).expand(*new.shape[:3], 1, new.shape[3])
        self.ring.scatter_(3, slot, new.unsqueeze(3))


def hidden_slots(positions: Tensor, window: int, kind: StepKind) -> Tensor:
    """Return which keys a step's queries do not see, bool [B, 1, 1, n, window + n - 1].

    The keys are those of the ring, followed by the step's own tokens that are not in it.

    Args:
        positions: int64 [B] of the real tokens, which are in the ring already.
    """
    own = kind.queries - 1
    column = torch.arange(window + own, device=positions.device)
    first = positions.view(-1, 1, 1, 1, 1)
    hidden = (column > first) & (column < window)  # slots that no token has used yet
    if kind is StepKind.PAIR:
        row = torch.arange(2, device=positions.device).view(2, 1)
        leaves = (first + 1 >= window) & (column == (first + 1) % window)  # leaves the draft query's window
        hidden = hidden | ((column >= window) & (row == 0)) | (leaves & (row == 1))
    return hidden


def _fused(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    """Run PyTorch's own attention, with the query heads of a KV head as its queries.

    It computes in the keys' dtype, which may differ from the query's under `torch.autocast`.
    """
    batch, heads, tokens, _ = keys.shape
    grouped = query.reshape(batch, heads, -1, query.shape[-1]).to(keys.dtype)  # [B, Hkv, G n, D]
    groups = query.shape[1] // heads
    seen = ~hidden.expand(-1, -1, groups, query.shape[2], tokens).reshape(batch, 1, -1, tokens)
    return scaled_dot_product_attention(grouped, keys, values, seen, scale=scaling).reshape(query.shape)
