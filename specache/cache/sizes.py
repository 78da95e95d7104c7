"""Sizes that follow from a configuration and a model's dimensions, as the cache allocates them.

`cache.layers`, `rows` and `tiers` allocate by these functions, and `planning` predicts with them.
"""

from __future__ import annotations

from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.low_bit.layout import PageLayout
from specache.model.dimensions import LayerDimensions, ModelDimensions
from specache.rows.hot_set import SLOT_INDEX_BYTES
from specache.tiers.disk.row_layout import BLOCK_TOKENS, RowLayout

CHECKPOINT_FEWEST = 4  # window checkpoints that a batch may always keep (each sequence at least one)
CHECKPOINT_BYTES = 64 << 20  # bytes of window checkpoints that a batch may always keep
ORDINARY_ITEMSIZE = 2  # bytes per element of the ordinary cache that sizes are compared with


def page_layout(config: SpeCacheConfig, layer: LayerDimensions) -> PageLayout:
    """Return the page layout of a full-attention layer."""
    return PageLayout(config.code, config.bits, config.group_size, layer.kv_heads, layer.head_dim)


def row_layout(model: ModelDimensions, layer: LayerDimensions) -> RowLayout:
    """Return the layout of a full-attention layer's blocks on disk."""
    return RowLayout(layer.kv_heads, layer.head_dim, model.itemsize)


def window_bytes(model: ModelDimensions) -> int:
    """Return the bytes of one sequence's ring buffers, which always hold whole windows."""
    return sum(layer.row_bytes(model.itemsize) * layer.window for layer in model.layers if layer.window is not None)


def checkpoint_allowance(model: ModelDimensions, tokens: int, sequences: int) -> int:
    """Return the most bytes of window checkpoints of a sequence, one of `sequences`.

    It is half the size of its full-attention layers' 16-bit rows, but at least its share of
    `CHECKPOINT_BYTES` and of `CHECKPOINT_FEWEST` checkpoints.
    """
    sequences = max(sequences, 1)
    rows = tokens * sum(layer.row_bytes(model.itemsize) for layer in model.full_layers)
    fewest = max(CHECKPOINT_FEWEST // sequences, 1)
    return max(fewest * window_bytes(model), CHECKPOINT_BYTES // sequences, rows // 2)


def ordinary_bytes(model: ModelDimensions, tokens: int) -> int:
    """Return the bytes of an ordinary 16-bit cache of one sequence."""
    lengths = ((layer, tokens if layer.window is None else min(tokens, layer.window)) for layer in model.layers)
    return sum(layer.row_bytes(ORDINARY_ITEMSIZE) * length for layer, length in lengths)


def fetches(config: SpeCacheConfig) -> bool:
    """Return whether rows are copied from the slow tier through a hot set."""
    return config.policy.fetches and config.slow_tier is not SlowTierKind.RAM_INPLACE


def on_disk(config: SpeCacheConfig) -> bool:
    """Return whether 16-bit rows are written to files."""
    return config.slow_tier is SlowTierKind.DISK and config.policy is not Policy.FULL


def read_buffer_bytes(config: SpeCacheConfig, row_bytes: int) -> int:
    """Return the bytes of read buffers of a layer whose token takes `row_bytes` (all KV heads).

    They hold the pairs of one step in flight and, on disk, the block that is being filled.
    """
    tail = BLOCK_TOKENS * row_bytes if on_disk(config) else 0
    return (config.top_k * row_bytes if fetches(config) else 0) + tail


def hot_slots(model: ModelDimensions, config: SpeCacheConfig, heads: int, head_dim: int, tokens: int, sequences: int) -> int:
    """Return a layer's hot-set slots per KV head, for a sequence of `tokens` tokens.

    The hot set's budget also pays for the rows in flight and the index. A fraction refers to an
    ordinary 16-bit cache, and gives the same number of slots for any dtype. Returns 0 where the
    budget is too small for the pairs of one step: the hot set then grows to that size when they are
    fetched.
    """
    if isinstance(config.hot_set, float):
        row = 2 * head_dim * ORDINARY_ITEMSIZE
        share = config.hot_set * tokens * row
    else:
        row = 2 * head_dim * model.itemsize
        share = config.hot_set / (len(model.full_layers) * heads * max(sequences, 1))
    slots = int((share - config.top_k * row) / (row + SLOT_INDEX_BYTES))
    return slots if slots >= config.top_k else 0
