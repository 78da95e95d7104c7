"""Sizes that follow from a configuration and a model's dimensions, as `layers`, `prefetch` and `tiers` allocate them."""

from __future__ import annotations

from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.low_bit.layout import PageLayout
from specache.model.dimensions import LayerDimensions, ModelDimensions
from specache.rows.hot_set import SLOT_INDEX_BYTES
from specache.tiers.disk.row_layout import BLOCK_TOKENS, RowLayout

CHECKPOINT_FEWEST = 4  # copies of the windows that a batch may keep however large they are, and each sequence one
CHECKPOINT_BYTES = 64 << 20  # of them that a batch may keep however short it is
ORDINARY_ITEMSIZE = 2  # the ordinary cache that everything is compared with has a 16-bit dtype


def page_layout(config: SpeCacheConfig, layer: LayerDimensions) -> PageLayout:
    """The pages of a full-attention layer."""
    return PageLayout(config.code, config.bits, config.group_size, layer.kv_heads, layer.head_dim)


def row_layout(model: ModelDimensions, layer: LayerDimensions) -> RowLayout:
    """The blocks of a full-attention layer on disk."""
    return RowLayout(layer.kv_heads, layer.head_dim, model.itemsize)


def window_bytes(model: ModelDimensions) -> int:
    """Ring buffers of one sequence's sliding layers: the whole window, however short the sequence."""
    return sum(layer.row_bytes(model.itemsize) * layer.window for layer in model.layers if layer.window is not None)


def checkpoint_allowance(model: ModelDimensions, tokens: int, sequences: int) -> int:
    """Most bytes that copies of the windows at earlier lengths may take beside one of `sequences`, of `tokens`: half of its
    full-attention layers' 16-bit rows, or more where that is little.
    """
    sequences = max(sequences, 1)
    rows = tokens * sum(layer.row_bytes(model.itemsize) for layer in model.full_layers)
    fewest = max(CHECKPOINT_FEWEST // sequences, 1)
    return max(fewest * window_bytes(model), CHECKPOINT_BYTES // sequences, rows // 2)


def ordinary_bytes(model: ModelDimensions, tokens: int) -> int:
    """An ordinary cache of one sequence in a 16-bit dtype."""
    lengths = ((layer, tokens if layer.window is None else min(tokens, layer.window)) for layer in model.layers)
    return sum(layer.row_bytes(ORDINARY_ITEMSIZE) * length for layer, length in lengths)


def fetches(config: SpeCacheConfig) -> bool:
    """Whether rows are copied from the slow tier through a hot set."""
    wants_rows = config.policy.verifies or config.policy.prefetches
    return wants_rows and config.slow_tier is not SlowTierKind.RAM_INPLACE


def on_disk(config: SpeCacheConfig) -> bool:
    """Whether 16-bit rows are written to files."""
    return config.slow_tier is SlowTierKind.DISK and config.policy is not Policy.FULL


def read_buffer_bytes(config: SpeCacheConfig, row_bytes: int) -> int:
    """Of a layer whose token takes `row_bytes` (all KV heads): the pairs of one step on their way, and a block that fills."""
    tail = BLOCK_TOKENS * row_bytes if on_disk(config) else 0
    return (config.top_k * row_bytes if fetches(config) else 0) + tail


def hot_slots(model: ModelDimensions, config: SpeCacheConfig, heads: int, head_dim: int, tokens: int, sequences: int) -> int:
    """Slots per KV head that the hot set's budget gives a layer of a sequence of `tokens`, rows in flight and the index paid for.

    A fraction is one of an ordinary cache at 16 bits, and gives as many slots in any dtype. 0 where it is too small for the pairs
    of one step: the hot set then grows to those when they are fetched.
    """
    if isinstance(config.hot_set, float):
        row = 2 * head_dim * ORDINARY_ITEMSIZE
        share = config.hot_set * tokens * row
    else:
        row = 2 * head_dim * model.itemsize
        share = config.hot_set / (len(model.full_layers) * heads * max(sequences, 1))
    slots = int((share - config.top_k * row) / (row + SLOT_INDEX_BYTES))
    return slots if slots >= config.top_k else 0
