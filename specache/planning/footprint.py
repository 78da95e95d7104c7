"""What a sequence holds in each tier, in bytes, from a model's dimensions: as `layers`, `prefetch` and `tiers` allocate it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields, replace

from specache.cache.layers import dense_capacity, residual_bytes
from specache.cache.sizes import (
    checkpoint_allowance,
    fetches,
    hot_slots,
    on_disk,
    page_layout,
    read_buffer_bytes,
    row_layout,
    window_bytes,
)
from specache.cache.window_checkpoints import Spacing
from specache.config import PAGE_TOKENS, Policy, SpeCacheConfig
from specache.model.dimensions import LayerDimensions, ModelDimensions
from specache.rows.hot_set import SLOT_INDEX_BYTES
from specache.tiers.disk.row_layout import BLOCK_TOKENS
from specache.tiers.ram import ram_capacity

FLOAT = 4  # bytes of a query or a key weight, a score, a log-sum-exp, an attention output before it is rounded


@dataclass(frozen=True)
class PlannedSequence:
    """One sequence as it is planned.

    Attributes:
        prompt: tokens after prefill.
        new: tokens that decoding stores after them.
        stored: tokens of the prompt that are there already.
        twin: an earlier sequence has the same prompt; it is prefilled once, and whole pages are shared.
    """

    prompt: int
    new: int = 0
    stored: int = 0
    twin: bool = False

    @property
    def total(self) -> int:
        return self.prompt + self.new


@dataclass(frozen=True)
class FastBytes:
    """Fast memory by part, in bytes, at the widest point of prefilling or of decoding.

    Attributes:
        low_bit: pages of the low-bit copy.
        residual: newest tokens at 16 bits.
        key_weights: of the rotated code, and the queries they are made from until then.
        hot_set: recently fetched rows and their index.
        read_buffers: rows on their way from the slow tier, and those that do not fill a block on disk yet.
        windows: of sliding layers.
        full_cache: the whole 16-bit cache of the full-attention layers, under policy `full`.
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


@dataclass(frozen=True)
class CacheFootprint:
    """What sequences of one batch hold.

    Attributes:
        config: with every `auto` decided.
        sequences: of the batch.
        pairs: pairs per KV head that a decode step fetches: `k`, or the longest copy of the batch.
    """

    model: ModelDimensions
    config: SpeCacheConfig
    sequences: int
    pairs: int

    def while_prefilled(self, load: PlannedSequence) -> list[FastBytes]:
        """When the key weights' queries are all there, and at the end: one of them is the widest point of its prefill.

        There is no hot set yet, unless the sequence had one or policy `previous` fills it in the last chunk.
        """
        end = prefix_end(self.model, self.config, load)
        lengths = [load.prompt] + ([] if end is None else [min(end, load.prompt)])
        moments = [self._held(load, length, self._pairs_in_prefill) for length in lengths]
        if load.stored or self.config.policy is Policy.PREVIOUS:
            return moments
        return [replace(moment, hot_set=0) for moment in moments]

    def prefilled(self, load: PlannedSequence) -> FastBytes:
        return self._held(load, load.prompt, self._pairs_in_prefill)

    def first_step(self, load: PlannedSequence) -> FastBytes:
        return self._held(load, load.prompt, self.pairs)

    def last_step(self, load: PlannedSequence) -> FastBytes:
        return self._held(load, load.total, self.pairs)

    def largest_hot_set(self, load: PlannedSequence) -> int:
        """Of one layer."""
        return max(self._hot_set(layer, load, self.pairs) for layer in set(self.model.full_layers))

    def growing(self, load: PlannedSequence, tokens: int) -> int:
        """The old buffer of one layer under policy `full`, while it is copied into the new one."""
        if self.config.policy is not Policy.FULL:
            return 0
        before = [0, *self._dense_growth(load, tokens)][-2]
        return max(layer.row_bytes(self.model.itemsize) * before for layer in set(self.model.full_layers))

    def slow(self, load: PlannedSequence) -> int:
        """16-bit rows in the slow tier; on disk with their checksums, in whole blocks."""
        if self.config.policy is Policy.FULL:
            return 0
        if on_disk(self.config):
            blocks = math.ceil(load.total / BLOCK_TOKENS)
            return blocks * sum(row_layout(self.model, layer).block_bytes for layer in self.model.full_layers)
        capacity = ram_capacity(load.prompt, load.total)
        return sum(layer.row_bytes(self.model.itemsize) * capacity for layer in self.model.full_layers)

    def checkpoints(self, load: PlannedSequence) -> int:
        """Copies of the windows at earlier lengths, as many as there will be where memory is not short."""
        windows = [layer.window for layer in self.model.layers if layer.window is not None]
        if not windows:
            return 0
        lengths = Spacing.of(windows).due_in_prompt(0, load.total, load.total)
        return min(len(lengths) * window_bytes(self.model), checkpoint_allowance(self.model, load.total, self.sequences))

    @property
    def _pairs_in_prefill(self) -> int:
        return self.pairs if self.config.policy is Policy.PREVIOUS else 0

    def _held(self, load: PlannedSequence, tokens: int, least_slots: int) -> FastBytes:
        total = FastBytes(windows=window_bytes(self.model))
        for layer, count in Counter(self.model.full_layers).items():
            if self.config.policy is Policy.FULL:
                total += self._dense(layer, load, tokens).times(count)
            else:
                total += self._compressed(layer, load, tokens, least_slots).times(count)
        return total

    def _compressed(self, layer: LayerDimensions, load: PlannedSequence, tokens: int, least_slots: int) -> FastBytes:
        capacity = self.config.residual + self.config.group_size
        row = layer.row_bytes(self.model.itemsize)
        both = residual_bytes(layer.kv_heads, layer.head_dim, capacity, self.model.itemsize)
        return FastBytes(
            low_bit=self._pages(layer, load, tokens),
            residual=capacity * row,
            key_weights=both - capacity * row + self._observed(layer, load, tokens),
            hot_set=self._hot_set(layer, load, least_slots),
            read_buffers=read_buffer_bytes(self.config, row),
        )

    def _pages(self, layer: LayerDimensions, load: PlannedSequence, tokens: int) -> int:
        shared = self.config.low_bit_length(load.prompt) // PAGE_TOKENS if load.twin else 0
        pages = math.ceil(self.config.low_bit_length(tokens) / PAGE_TOKENS) - shared
        return pages * page_layout(self.config, layer).page_bytes

    def _observed(self, layer: LayerDimensions, load: PlannedSequence, tokens: int) -> int:
        """Queries of the first `R + g` tokens, held until the pass after the one that completes them.

        A prompt shorter than that completes them while decoding, whenever that is: they are counted from the beginning to the end.
        """
        prefix = self.config.residual + self.config.group_size
        end = prefix_end(self.model, self.config, load)
        if end is None or (tokens > end and load.prompt >= prefix):
            return 0
        return min(load.total, prefix) * layer.kv_heads * layer.head_dim * FLOAT

    def _hot_set(self, layer: LayerDimensions, load: PlannedSequence, least_slots: int) -> int:
        if not fetches(self.config):
            return 0
        slots = hot_slots(self.model, self.config, layer.kv_heads, layer.head_dim, load.prompt, self.sequences)
        return max(slots, least_slots) * (layer.row_bytes(self.model.itemsize) + layer.kv_heads * SLOT_INDEX_BYTES)

    def _dense(self, layer: LayerDimensions, load: PlannedSequence, tokens: int) -> FastBytes:
        """One layer under policy `full`."""
        return FastBytes(full_cache=self._dense_growth(load, tokens)[-1] * layer.row_bytes(self.model.itemsize))

    def _dense_growth(self, load: PlannedSequence, tokens: int) -> list[int]:
        """Capacities, in tokens, that a buffer goes through."""
        capacities, length = [load.stored], load.stored
        chunk = min(self.config.prefill_chunk, load.prompt)
        for needed in [*range(load.stored + chunk, load.prompt, chunk), *range(load.prompt, tokens + 1)]:
            if needed > capacities[-1]:
                capacities.append(dense_capacity(length, needed))
            length = needed
        return capacities


def last_chunk(model: ModelDimensions, config: SpeCacheConfig, load: PlannedSequence) -> tuple[int, int]:
    """(tokens of a whole prefill chunk, tokens stored before the last one)."""
    if model.rope_switch is not None and load.prompt > model.rope_switch:
        return load.prompt, 0
    rest = load.prompt - load.stored
    chunk = min(config.prefill_chunk, rest)
    return chunk, load.stored + (rest - 1) // chunk * chunk


def prefix_end(model: ModelDimensions, config: SpeCacheConfig, load: PlannedSequence) -> int | None:
    """Tokens stored when the queries of the first `R + g` are all there and still held; `None` if they were gone before."""
    prefix = config.residual + config.group_size
    if load.stored >= prefix:
        return None
    chunk, _ = last_chunk(model, config, load)
    passes = math.ceil((prefix - load.stored) / chunk)
    return min(load.stored + passes * chunk, load.prompt) if load.prompt >= prefix else min(prefix, load.total)
