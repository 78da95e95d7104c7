"""Draw synthetic keys and values, and fill layers with them through a prefill's own code.

No prompt is read. Kernels take the same time for any numbers, except `select`, which depends on the
spread of the scores: it is that of a real layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.bench.compute_device import CPU, CUDA
from specache.cache.cache import SpeCache
from specache.cache.compressed_layer import CompressedLayer
from specache.cache.dense_layer import DenseLayer
from specache.cache.sequence import Sequence
from specache.cache.window_layer import WindowLayer
from specache.config import SpeCacheConfig
from specache.device.static_sizes import row_room
from specache.kernels.types import AttentionParams
from specache.tiers.base import SlowTier

LayerShape = tuple[int, int]  # (Hkv, D)
_BLOCK = 4096  # tokens drawn at a time
SPARE_TOKENS = 1024  # decode steps for which the slow tier has room

Rows = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values [Hkv, S, D]


def synthetic_rows(
    heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int, device: torch.device | str = CPU
) -> tuple[Tensor, Tensor]:
    """Draw seeded normal keys and values [Hkv, S, D] on a device.

    Each channel of the keys has a mean of its own, as real keys do after RoPE.
    """
    generator = torch.Generator(device).manual_seed(seed)
    mean = torch.randn(heads, 1, dim, generator=generator, device=device)
    keys, values = (torch.empty(heads, tokens, dim, dtype=dtype, device=device) for _ in range(2))
    for start in range(0, tokens, _BLOCK):
        count = min(_BLOCK, tokens - start)
        keys[:, start : start + count] = torch.randn(heads, count, dim, generator=generator, device=device) + mean
        values[:, start : start + count] = torch.randn(heads, count, dim, generator=generator, device=device)
    return keys, values


def fill_compressed(layer: CompressedLayer, tier: SlowTier, keys: Tensor, values: Tensor) -> None:
    """Fill an empty layer with keys and values [Hkv, S, D].

    All rows go to the slow tier; low-bit copy and residual are built from them.
    """
    tier.write(layer.index, 0, keys, values)
    layer.rebuild(keys.shape[1])


def copy_compressed(layer: CompressedLayer, filled: CompressedLayer) -> None:
    """Copy low-bit copy, residual and key scales of another sequence's layer into an empty one."""
    layer.table.extend(filled.table.length)
    layer.table.copy_pages(filled.table)
    residual = torch.stack([x[:, : filled.residual_count] for x in (filled.residual_keys, filled.residual_values)])
    layer.restore(residual, filled.key_scales.fork(filled.key_scales.tokens), None)


def reserved_tokens(config: SpeCacheConfig, tokens: int, device: torch.device, new: int = 0) -> int:
    """Return the tokens for which the slow tier of a sequence of `tokens` has room."""
    spared = tokens + max(SPARE_TOKENS, new)
    return max(spared, row_room(config, spared)) if device.type == CUDA else spared


def fill_window(layer: WindowLayer, keys: Tensor, values: Tensor) -> None:
    """Fill an empty sliding layer with the newest of keys and values [Hkv, S, D].

    Older rows are dropped.
    """
    newest = min(layer.window, keys.shape[1])
    layer.length = keys.shape[1] - newest
    query = keys[:, -newest:]
    layer.prefill(query, keys[:, -newest:], values[:, -newest:], AttentionParams(scaling=keys.shape[2] ** -0.5))


def add_sequence(cache: SpeCache, layers: Rows, like: Sequence | None = None, shares_rows: bool = False) -> None:
    """Add a sequence that holds keys and values [Hkv, S, D] per layer, in memory of its own.

    Args:
        like: a sequence that was filled with the same. Its low-bit copy is copied, which is faster
            than to quantise again.
        shares_rows: use the slow tier of `like` instead of one with the same rows.
    """
    sequence = cache.new_sequence()
    cache.sequences.append(sequence)
    tokens = next(iter(layers.values()))[0].shape[1]
    if like is not None and shares_rows:
        sequence.tier.close()
        sequence.tier = like.tier
    else:
        sequence.tier.reserve(reserved_tokens(cache.config, tokens, cache.info.device))  # decoding appends without moving the rows
    for index, (keys, values) in layers.items():
        layer = sequence.layer(index, keys)
        if isinstance(layer, CompressedLayer) and like is not None:
            if not shares_rows:
                sequence.tier.write(index, 0, keys, values)
            copy_compressed(layer, like.compressed[index])
        elif isinstance(layer, CompressedLayer):
            fill_compressed(layer, sequence.tier, keys, values)
        elif isinstance(layer, WindowLayer):
            fill_window(layer, keys, values)
        else:
            assert isinstance(layer, DenseLayer)
            layer.extend(keys, values)
    sequence.commit([0] * tokens)
