"""The state of one forward pass, which the attention layers receive as the argument `specache=`."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from typing import Protocol

import torch
from torch import Tensor

from specache.attention.all_layers import StepOfLayers
from specache.attention.at_once import decode_at_once
from specache.attention.decode import StepSpec, mixed_attention, select_first
from specache.cache.compressed_layer import CompressedLayer
from specache.cache.dense_layer import DenseLayer
from specache.cache.sequence import Sequence
from specache.cache.window_layer import WindowLayer
from specache.config import Policy, TopK
from specache.kernels.types import AttentionParams
from specache.platform import modes

Observer = Callable[[int, Tensor, AttentionParams], None]  # (layer, queries [Hq, n, D], params) of a prefill chunk


class ForwardPass(Protocol):
    """Computes the attention of every layer in one forward pass."""

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Return the attention output [B, n, Hq, D] of layer `index`, in the query's dtype.

        Args:
            query: [B, Hq, n, D].
            keys, values: the new ones [B, Hkv, n, D].
        """


def attend(state: ForwardPass, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """Return `state.attention(...)`, contiguous, computed in our PyTorch modes, not the caller's.

    Under `torch.autocast` the query and the result have the dtype of stock attention.
    """
    dtype = modes.autocast_dtype(query)
    if dtype is not None:
        query = query.to(dtype)
    in_ours = modes.ours_again()
    if in_ours is None:
        return state.attention(index, query, keys, values, params).contiguous()
    with in_ours:
        return state.attention(index, query, keys, values, params).contiguous()


class PrefillPass:
    """The forward pass over one chunk of a sequence's prompt.

    Args:
        sequence: the sequence that the chunk is appended to.
        policy, top_k: if the policy `selects_in_prefill`, the last prompt token selects `top_k`
            pairs.
        is_last: whether the chunk ends the prompt.
        observe: called with the queries of full-attention layers.
    """

    def __init__(self, sequence: Sequence, policy: Policy, top_k: TopK, is_last: bool, observe: Observer | None = None) -> None:
        self._sequence = sequence
        self._select_first = is_last and policy.selects_in_prefill
        self._top_k = top_k
        self._observe = observe

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        layer = self._sequence.layer(index, keys[0], values[0])
        keys, values = keys.to(layer.dtype), values.to(layer.dtype)
        if self._observe is not None and not isinstance(layer, WindowLayer):
            self._observe(index, query[0], params)
        if isinstance(layer, WindowLayer):
            self._sequence.capture_window(layer, keys[0], values[0])
        out = layer.prefill(query[0], keys[0], values[0], params)  # [Hq, n, D]
        if self._select_first and isinstance(layer, CompressedLayer):
            select_first(query[0, :, -1:], layer, params, self._top_k)
        return out.transpose(0, 1)[None].to(query.dtype)


class DecodePass:
    """The forward pass over one or two tokens of every active sequence."""

    def __init__(self, sequences: Sequences[Sequence], spec: StepSpec) -> None:
        self._sequences = sequences
        self._spec = spec

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        layers = [sequence.layers[index] for sequence in self._sequences]
        dtype = layers[0].dtype
        if keys.dtype is not dtype or values.dtype is not dtype:
            keys, values = keys.to(dtype), values.to(dtype)
        compressed = [layer for layer in layers if isinstance(layer, CompressedLayer)]
        if compressed:
            at_once = decode_at_once(query, keys, values, compressed, params, self._spec)
            if at_once is not None:
                return at_once
            out = self._compressed(query, keys, values, compressed, params)
        else:
            out = torch.stack([self._full_precision(layer, query[b], keys[b], values[b], params) for b, layer in enumerate(layers)])
        return out.transpose(1, 2).to(query.dtype)  # [B, n, Hq, D]

    def begin_layers(self, numbers: Sequences[int], dtype: torch.dtype, kv_shape: tuple[int, int]) -> StepOfLayers | None:
        """Begin the attention of all these layers, in one call of the kernels.

        Args:
            dtype: of the queries.
            kv_shape: KV heads and head dimension.

        Returns:
            `None` where a layer takes more than that call.
        """
        groups: list[list[CompressedLayer]] = []
        for number in numbers:
            layers = [sequence.layers.get(number) for sequence in self._sequences]
            group = [layer for layer in layers if isinstance(layer, CompressedLayer) and layer.dtype is dtype]
            if len(group) < len(layers):
                return None
            groups.append(group)
        return StepOfLayers.begin(groups, dtype, kv_shape, self._spec)

    def _compressed(
        self, query: Tensor, keys: Tensor, values: Tensor, layers: list[CompressedLayer], params: AttentionParams
    ) -> Tensor:
        if self._spec.kind.commits:
            for b, layer in enumerate(layers):
                layer.append(query[b, :, :1], keys[b, :, :1], values[b, :, :1])
        return mixed_attention(query, keys, values, layers, params, self._spec)

    def _full_precision(
        self,
        layer: CompressedLayer | DenseLayer | WindowLayer,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        params: AttentionParams,
    ) -> Tensor:
        if isinstance(layer, WindowLayer):
            return layer.decode(query, keys, values, params, self._spec.kind)
        assert isinstance(layer, DenseLayer)
        return layer.decode(query, keys, values, params)
