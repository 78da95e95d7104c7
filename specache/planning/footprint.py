"""Compute the bytes that each sequence holds in each tier, from a model's dimensions.

The sizes are those of `cache.sizes`, by which `cache.compressed_layer` claims them; here is only
how many pages, slots and tokens a sequence has at each moment.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from specache.cache.sizes import (
    FastBytes,
    checkpoint_allowance,
    compressed_bytes,
    dense_capacity,
    fetches,
    hot_slots,
    low_bit_pages,
    on_disk,
    pairs_in_flight,
    row_layout,
    window_bytes,
)
from specache.cache.window_checkpoints import Spacing
from specache.config import PAGE_TOKENS, Policy, SpeCacheConfig
from specache.device.static_sizes import row_room, unsupported_reason
from specache.model.dimensions import LayerDimensions, ModelDimensions
from specache.tiers.disk.row_layout import BLOCK_TOKENS as DISK_BLOCK_TOKENS
from specache.tiers.layer_rows import planned_capacity
from specache.tiers.row_memory import BLOCK_TOKENS


@dataclass(frozen=True)
class PlannedSequence:
    """One sequence of a batch that is planned.

    Attributes:
        prompt: prompt length, in tokens.
        new: tokens that decoding appends.
        stored: prompt tokens that the cache already holds.
        twin: True if an earlier sequence of the batch has the same prompt. It is prefilled once,
            and both share whole pages.
    """

    prompt: int
    new: int = 0
    stored: int = 0
    twin: bool = False

    @property
    def total(self) -> int:
        return self.prompt + self.new


@dataclass(frozen=True)
class CacheFootprint:
    """The bytes that the sequences of one batch hold.

    Attributes:
        config: settings with every `auto` resolved.
        sequences: number of sequences in the batch.
        pairs: pairs per KV head that a decode step fetches: `k`, or fewer if no low-bit copy of the
            batch has as many.
    """

    model: ModelDimensions
    config: SpeCacheConfig
    sequences: int
    pairs: int

    def while_prefilled(self, sequence: PlannedSequence) -> list[FastBytes]:
        """Return the bytes at the two candidates for the peak of a sequence's prefill.

        They are the moment when the queries for the key scales are complete, and the end. The hot
        set is empty then, unless the sequence had one before or policy `previous` fills it in the
        last chunk.
        """
        end = prefix_end(self.model, self.config, sequence)
        lengths = [sequence.prompt] + ([] if end is None else [min(end, sequence.prompt)])
        moments = [self._held(sequence, length, self._pairs_in_prefill) for length in lengths]
        if sequence.stored or self.config.policy.selects_in_prefill:
            return moments
        return [replace(moment, hot_set=0) for moment in moments]

    def prefilled(self, sequence: PlannedSequence) -> FastBytes:
        """Return the bytes of a sequence after its prefill."""
        return self._held(sequence, sequence.prompt, self._pairs_in_prefill)

    def between_steps(self, sequence: PlannedSequence) -> FastBytes:
        """Return the bytes of a sequence while another is prefilled.

        One that has stored tokens may have decoded, and then has a hot set.
        """
        return self.first_step(sequence) if sequence.stored else self.prefilled(sequence)

    def first_step(self, sequence: PlannedSequence) -> FastBytes:
        """Return the bytes of a sequence in its first decode step."""
        return self._held(sequence, sequence.prompt, self.pairs)

    def last_step(self, sequence: PlannedSequence) -> FastBytes:
        """Return the bytes of a sequence in its last decode step."""
        return self._held(sequence, sequence.total, self.pairs)

    def largest_hot_set(self, sequence: PlannedSequence) -> int:
        """Return the bytes of the largest hot set of any layer."""
        return max(self._compressed(layer, sequence, 0, self.pairs).hot_set for layer in set(self.model.full_layers))

    def growing(self, sequence: PlannedSequence, tokens: int) -> int:
        """Return the bytes of one layer's old buffer, held while it is copied to a larger one
        (policy `full`).
        """
        if self.config.policy is not Policy.FULL:
            return 0
        before = [0, *self._dense_growth(sequence, tokens)][-2]
        return max(layer.row_bytes(self.model.itemsize) * before for layer in set(self.model.full_layers))

    def slow(self, sequence: PlannedSequence) -> int:
        """Return the bytes of 16-bit pairs in the slow tier: on disk, blocks with checksums."""
        if self.config.policy is Policy.FULL:
            return 0
        if on_disk(self.config):
            blocks = math.ceil(sequence.total / DISK_BLOCK_TOKENS)
            return blocks * sum(row_layout(self.model, layer).block_bytes for layer in self.model.full_layers)
        block = None if self.model.device == "cuda" else BLOCK_TOKENS
        capacity = planned_capacity(block, sequence.prompt, sequence.total)
        if block is None and not unsupported_reason(self.config, self.model.dynamic_rope):  # steps over static buffers
            capacity = row_room(self.config, sequence.total)
        if sequence.twin and block is not None:
            capacity -= sequence.prompt // block * block  # whole blocks are shared
        return sum(layer.row_bytes(self.model.itemsize) * capacity for layer in self.model.full_layers)

    def checkpoints(self, sequence: PlannedSequence) -> int:
        """Return the bytes of the window checkpoints, as many as are kept while memory is not
        short.
        """
        windows = [layer.window for layer in self.model.layers if layer.window is not None]
        if not windows:
            return 0
        lengths = Spacing.of(windows).due_in_prompt(0, sequence.total, sequence.total)
        return min(len(lengths) * window_bytes(self.model), checkpoint_allowance(self.model, sequence.total, self.sequences))

    @property
    def _pairs_in_prefill(self) -> int:
        return self.pairs if self.config.policy.selects_in_prefill else 0

    def _held(self, sequence: PlannedSequence, tokens: int, least_slots: int) -> FastBytes:
        total = FastBytes(windows=window_bytes(self.model))
        for layer, count in Counter(self.model.full_layers).items():
            if self.config.policy is Policy.FULL:
                capacity = self._dense_growth(sequence, tokens)[-1]
                total += FastBytes(full_cache=count * capacity * layer.row_bytes(self.model.itemsize))
            else:
                total += self._compressed(layer, sequence, tokens, least_slots).times(count)
        return total

    def _compressed(self, layer: LayerDimensions, sequence: PlannedSequence, tokens: int, least_slots: int) -> FastBytes:
        shared = self.config.low_bit_length(sequence.prompt) // PAGE_TOKENS if sequence.twin else 0
        return compressed_bytes(
            self.config,
            layer.kv_heads,
            layer.head_dim,
            self.model.itemsize,
            pages=low_bit_pages(self.config, tokens) - shared,
            observed=self._observed(sequence, tokens),
            slots=self._slots(layer, sequence, least_slots),
            pairs=pairs_in_flight(self.config, self.config.low_bit_length(tokens)),
        )

    def _observed(self, sequence: PlannedSequence, tokens: int) -> int:
        """Return how many of the first `R + g` queries are kept. They are dropped in the pass after
        the one that completes them.

        With a prompt shorter than `R + g`, decoding completes them. They are then counted
        throughout.
        """
        prefix = self.config.residual + self.config.group_size
        end = prefix_end(self.model, self.config, sequence)
        if end is None or (tokens > end and sequence.prompt >= prefix):
            return 0
        return min(sequence.total, prefix)

    def _slots(self, layer: LayerDimensions, sequence: PlannedSequence, least_slots: int) -> int:
        if not fetches(self.config):
            return 0
        slots = hot_slots(self.model, self.config, layer.kv_heads, layer.head_dim, sequence.prompt, self.sequences)
        return max(slots, least_slots)

    def _dense_growth(self, sequence: PlannedSequence, tokens: int) -> list[int]:
        """Return the successive capacities of a buffer under policy `full`, in tokens."""
        capacities, length = [sequence.stored], sequence.stored
        chunk = min(self.config.prefill_chunk, sequence.prompt)
        for needed in [*range(sequence.stored + chunk, sequence.prompt, chunk), *range(sequence.prompt, tokens + 1)]:
            if needed > capacities[-1]:
                capacities.append(dense_capacity(length, needed))
            length = needed
        return capacities


def last_chunk(model: ModelDimensions, chunk: int, prompt: int, stored: int) -> tuple[int, int]:
    """Return (tokens of a full prefill chunk, tokens stored before the last chunk).

    Args:
        chunk: the most tokens of a chunk.
        prompt, stored: tokens of the prompt, and how many of them are stored.
    """
    if model.rope_switch is not None and prompt > model.rope_switch:
        return prompt, 0
    chunk = min(chunk, prompt - stored)
    return chunk, stored + (prompt - stored - 1) // chunk * chunk


def prefix_end(model: ModelDimensions, config: SpeCacheConfig, sequence: PlannedSequence) -> int | None:
    """Return the length at which the first `R + g` queries are complete and still kept.

    Return None if they were freed before this prefill.
    """
    prefix = config.residual + config.group_size
    if sequence.stored >= prefix:
        return None
    chunk, _ = last_chunk(model, config.prefill_chunk, sequence.prompt, sequence.stored)
    passes = math.ceil((prefix - sequence.stored) / chunk)
    return min(sequence.stored + passes * chunk, sequence.prompt) if sequence.prompt >= prefix else min(prefix, sequence.total)
