"""Draw synthetic keys and values, and fill layers with them through a prefill's own code.

No prompt is read. Kernels take the same time for any numbers, except `select`, which depends on the
spread of the scores: it is that of a real layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.cache.cache import SpeCache
from specache.cache.layers import CompressedLayer, DenseLayer
from specache.cache.window_layer import WindowLayer
from specache.kernels.types import AttentionParams
from specache.tiers.base import SlowTier

LayerShape = tuple[int, int]  # (Hkv, D)
_BLOCK = 4096  # tokens drawn at a time
SPARE_TOKENS = 1024  # decode steps for which the slow tier has room


def synthetic_rows(heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Draw seeded normal keys and values [Hkv, S, D].

    Each channel of the keys has a mean of its own, as real keys do after RoPE.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(heads, 1, dim, generator=generator)
    keys, values = (torch.empty(heads, tokens, dim, dtype=dtype) for _ in range(2))
    for start in range(0, tokens, _BLOCK):
        count = min(_BLOCK, tokens - start)
        keys[:, start : start + count] = torch.randn(heads, count, dim, generator=generator) + mean
        values[:, start : start + count] = torch.randn(heads, count, dim, generator=generator)
    return keys, values


def fill_compressed(layer: CompressedLayer, tier: SlowTier, keys: Tensor, values: Tensor) -> None:
    """Fill an empty layer with keys and values [Hkv, S, D].

    All rows go to the slow tier; low-bit copy and residual are built from them.
    """
    tier.write(layer.index, 0, keys, values)
    layer.rebuild(keys.shape[1])


def fill_window(layer: WindowLayer, keys: Tensor, values: Tensor) -> None:
    """Fill an empty sliding layer with the newest of keys and values [Hkv, S, D].

    Older rows are dropped.
    """
    newest = min(layer.window, keys.shape[1])
    layer.length = keys.shape[1] - newest
    query = keys[:, -newest:]
    layer.prefill(query, keys[:, -newest:], values[:, -newest:], AttentionParams(scaling=keys.shape[2] ** -0.5))


def add_sequence(cache: SpeCache, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Add a sequence that holds keys and values [Hkv, S, D] per layer, in memory of its own."""
    sequence = cache.new_sequence()
    cache.sequences.append(sequence)
    tokens = next(iter(layers.values()))[0].shape[1]
    sequence.tier.reserve(tokens + SPARE_TOKENS)  # decoding appends without moving the rows
    for index, (keys, values) in layers.items():
        layer = sequence.layer(index, keys)
        if isinstance(layer, CompressedLayer):
            fill_compressed(layer, sequence.tier, keys, values)
        elif isinstance(layer, WindowLayer):
            fill_window(layer, keys, values)
        else:
            assert isinstance(layer, DenseLayer)
            layer.extend(keys, values)
    sequence.commit([0] * tokens)
