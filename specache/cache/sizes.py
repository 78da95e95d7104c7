"""Sizes that follow from a configuration and a model's dimensions, as the cache allocates them.

One account of bytes: the same functions say what the planner predicts, what the layers claim of the
byte budget, and what statistics report. The sizes of a page (`low_bit.layout`), of key scales
(`low_bit.key_scales`), of a hot-set slot (`rows.hot_set`) and of a block on disk
(`tiers.disk.row_layout`) are beside what allocates them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from specache.config import PAGE_TOKENS, Policy, SlowTierKind, SpeCacheConfig
from specache.low_bit.key_scales import key_scale_bytes
from specache.low_bit.layout import PageLayout
from specache.model.dimensions import LayerDimensions, ModelDimensions, row_bytes
from specache.rows.hot_set import slot_bytes
from specache.tiers.disk.row_layout import BLOCK_TOKENS, RowLayout

CHECKPOINT_FEWEST = 4  # window checkpoints that a batch may always keep (each sequence at least one)
CHECKPOINT_BYTES = 64 << 20  # bytes of window checkpoints that a batch may always keep
ORDINARY_ITEMSIZE = 2  # bytes per element of the ordinary cache that sizes are compared with


@dataclass(frozen=True)
class FastBytes:
    """Fast memory by part, in bytes.

    Attributes:
        low_bit: pages of the low-bit copy.
        residual: newest tokens at 16 bits.
        key_weights: key scales of the rotated code, and the queries that they are computed from
            while those are kept.
        hot_set: recently fetched 16-bit pairs and their index.
        read_buffers: pairs in transfer from the slow tier, and pairs that do not fill a block on
            disk yet.
        windows: caches of the sliding-window layers.
        full_cache: the 16-bit cache of the full-attention layers, under policy `full`.
        working_set: activations, scores and logits of one pass.
    """

    low_bit: int = 0
    residual: int = 0
    key_weights: int = 0
    hot_set: int = 0
    read_buffers: int = 0
    windows: int = 0
    full_cache: int = 0
    working_set: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: FastBytes) -> FastBytes:
        return FastBytes(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def times(self, count: int) -> FastBytes:
        return FastBytes(**{f.name: getattr(self, f.name) * count for f in fields(self)})


def compressed_bytes(
    config: SpeCacheConfig,
    heads: int,
    dim: int,
    itemsize: int,
    *,
    pages: int,
    observed: int,
    slots: int,
    pairs: int,
    scales_fixed: bool = True,
) -> FastBytes:
    """Return the fast memory of a full-attention layer of one sequence (`CompressedLayer`).

    Args:
        heads, dim: KV heads and head dimension.
        itemsize: bytes per element of its rows.
        pages: pages of its low-bit copy.
        observed: tokens whose queries are kept for the key scales.
        slots: hot-set slots per KV head.
        pairs: pairs per KV head of a step (`pairs_in_flight`).
        scales_fixed: False before the key scales are computed. They are claimed from the start.
    """
    row = row_bytes(heads, dim, itemsize)
    return FastBytes(
        low_bit=pages * page_layout(config, heads, dim).page_bytes,
        residual=(config.residual + config.group_size) * row,
        key_weights=key_scale_bytes(heads, dim, observed, scales_fixed),
        hot_set=slots * slot_bytes(heads, dim, itemsize),
        # the pairs of one step in flight and, on disk, the block that is being filled
        read_buffers=((pairs if fetches(config) else 0) + (BLOCK_TOKENS if on_disk(config) else 0)) * row,
    )


def pairs_in_flight(config: SpeCacheConfig, low_bit: int) -> int:
    """Return the most pairs per KV head that a step of a sequence with so many low-bit tokens
    selects: its next step may have a group more to select from.
    """
    return config.selection.most(low_bit + config.group_size)


def low_bit_pages(config: SpeCacheConfig, tokens: int) -> int:
    """Return the pages of a layer's low-bit copy of a sequence of `tokens` tokens."""
    return -(-config.low_bit_length(tokens) // PAGE_TOKENS)


def page_layout(config: SpeCacheConfig, heads: int, dim: int) -> PageLayout:
    """Return the page layout of a full-attention layer."""
    return PageLayout(config.code, config.bits, config.group_size, heads, dim)


def row_layout(model: ModelDimensions, layer: LayerDimensions) -> RowLayout:
    """Return the layout of a full-attention layer's blocks on disk."""
    return RowLayout(layer.kv_heads, layer.head_dim, model.itemsize)


def dense_capacity(length: int, needed: int) -> int:
    """Return the capacity of a `DenseLayer` of `length` that must grow to `needed` tokens."""
    return max(needed, length * 9 // 8)


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


def ordinary_bytes(model: ModelDimensions, tokens: int, itemsize: int = ORDINARY_ITEMSIZE) -> int:
    """Return the bytes of an ordinary cache of one sequence, at 16 bits by default."""
    return sum(layer.row_bytes(itemsize) * layer.kept(tokens) for layer in model.layers)


def fetches(config: SpeCacheConfig) -> bool:
    """Return whether rows are copied from the slow tier through a hot set."""
    return config.policy.fetches and config.slow_tier is not SlowTierKind.RAM_INPLACE


def on_disk(config: SpeCacheConfig) -> bool:
    """Return whether 16-bit rows are written to files."""
    return config.slow_tier is SlowTierKind.DISK and config.policy is not Policy.FULL


def hot_slots(model: ModelDimensions, config: SpeCacheConfig, heads: int, head_dim: int, tokens: int, sequences: int) -> int:
    """Return a layer's hot-set slots per KV head, for a sequence of `tokens` tokens.

    The hot set's budget also pays for the rows in flight and the index. A fraction refers to an
    ordinary 16-bit cache, and gives the same number of slots for any dtype. Returns 0 where the
    budget is too small for the pairs of one step: the hot set then grows to that size when they are
    fetched.
    """
    if isinstance(config.hot_set, float):
        itemsize = ORDINARY_ITEMSIZE
        share = config.hot_set * tokens * row_bytes(1, head_dim, itemsize)
    else:
        itemsize = model.itemsize
        share = config.hot_set / (len(model.full_layers) * heads * max(sequences, 1))
    pairs = pairs_in_flight(config, config.low_bit_length(tokens))
    slots = int((share - pairs * row_bytes(1, head_dim, itemsize)) / slot_bytes(1, head_dim, itemsize))
    return slots if slots >= pairs else 0
