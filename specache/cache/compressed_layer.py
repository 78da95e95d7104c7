"""A full-attention layer of one sequence: a low-bit copy, a residual, and 16-bit rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specache.attention.dense import JOINED_ROWS, KEY_BLOCK, attend_part, merge, merge_each
from specache.cache.base_layer import LayerState
from specache.cache.sizes import ORDINARY_ITEMSIZE, FastBytes, compressed_bytes, pairs_in_flight
from specache.config import Code, SpeCacheConfig
from specache.kernels import dispatch
from specache.kernels.finite import check_finite
from specache.kernels.torch.exact import Part
from specache.kernels.types import AttentionParams, KeptLayer, LowBitKV
from specache.low_bit.key_scales import KeyScales
from specache.low_bit.pool import PageTable
from specache.rows.fetch import RowFetcher
from specache.stats import MemoryUse
from specache.tiers.base import SlowTier
from specache.tiers.layer_rows import LayerRows
from specache.tiers.transfer import upload


class CompressedLayer(LayerState):
    """A full-attention layer: low-bit copy in pages, exact residual, 16-bit rows in the slow tier.

    Args:
        index, keys: see `LayerState`.
        table: its (empty) page table. The budget of the table's pool bounds the whole layer.
        tier: the sequence's slow tier.
        row_fetcher: fetches the layer's rows in decode steps.
    """

    def __init__(
        self, index: int, config: SpeCacheConfig, table: PageTable, tier: SlowTier, row_fetcher: RowFetcher, keys: Tensor
    ) -> None:
        capacity = config.residual + config.group_size
        empty = compressed_bytes(
            config, keys.shape[0], keys.shape[2], keys.itemsize, pages=0, observed=0, slots=0, pairs=pairs_in_flight(config, 0)
        )
        claim = table.pool.budget.claim(empty.total, "residuals, key weights and read buffers")
        super().__init__(index, keys, capacity, claim)
        self.config = config
        self.table = table
        self.tier = tier
        self.row_fetcher = row_fetcher
        self.next_positions: Tensor | None = None
        self.residual_count = 0
        self.key_scales = KeyScales(capacity)
        self.kept: KeptLayer | None = None

    @property
    def low_bit_kv(self) -> LowBitKV:
        return self.table.low_bit_kv(self.key_scales.value)

    @property
    def channel_scales(self) -> Tensor | None:
        return self.key_scales.value

    @property
    def length(self) -> int:
        return self.table.length + self.residual_count

    @property
    def residual_keys(self) -> Tensor:
        return self._kv_rows[0, :, : self.residual_count]

    @property
    def residual_values(self) -> Tensor:
        return self._kv_rows[1, :, : self.residual_count]

    @property
    def residual_buffer(self) -> Tensor:
        """The residual and room behind it, keys and values [2, Hkv, R + g, D]."""
        return self._kv_rows

    @property
    def pending_group_tokens(self) -> int:
        """Tokens at the front of the residual, whole groups, that are to be quantised next."""
        return self.pending_after(0)

    @property
    def held_bytes(self) -> int:
        return self._bytes(self.config).total

    @property
    def hot_bytes(self) -> int:
        """Bytes of the budget that its hot set holds."""
        return self._bytes(self.config).hot_set

    def memory(self, itemsize: int | None = None) -> MemoryUse:
        held = self._bytes(self.config, itemsize, self.key_scales.value is not None)
        return MemoryUse(
            fast=held.low_bit + held.residual + held.key_weights,
            hot=held.hot_set + self.row_fetcher.staged_rows * (self._row_bytes(itemsize) // self._kv_rows.shape[1]),
            full=self.length * self._row_bytes(ORDINARY_ITEMSIZE),
        )

    def claim_buffers(self, config: SpeCacheConfig, growing: int = 0) -> None:
        """Claim bytes for residual, key scales (fixed or not), their queries, and read buffers.

        Args:
            config: the settings in use, or those of the tier that is used next.
            growing: low-bit tokens that are stored next.

        Raises:
            FastMemoryError: the budget has no room; the claim is unchanged.
        """
        held = self._bytes(config, growing=growing)
        self._claim.resize(held.residual + held.key_weights + held.read_buffers)

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Attend exactly with the next n prompt tokens and store them (paper Algorithm 1).

        Earlier rows are read back from the slow tier block by block.

        Args:
            query: [Hq, n, D]; keys, values: [Hkv, n, D].

        Returns:
            float32 [Hq, n, D].
        """
        check_finite(keys, values, self.index)
        self._observe(query)
        out, _ = merge([merge_each(self._parts(query, keys, values, params))], params.sinks)
        self.store(keys, values)
        return out

    def append(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add one token, query [Hq, 1, D], key and value [Hkv, 1, D], to residual and slow tier."""
        check_finite(keys, values, self.index)
        self._observe(query)
        self.tier.write(self.index, self.length, keys, values)
        self._kv_rows[0, :, self.residual_count] = keys[:, 0]
        self._kv_rows[1, :, self.residual_count] = values[:, 0]
        self.residual_count += 1

    @property
    def has_room(self) -> bool:
        """Whether kernels may store the next token (`SlowTier.has_room`)."""
        return self.tier.has_room(self.index, self.length)

    def pending_after(self, tokens: int) -> int:
        """Return `pending_group_tokens` after `tokens` more tokens were appended."""
        return self.config.low_bit_length(self.length + tokens) - self.table.length

    def rows_with_room(self, tokens: int) -> LayerRows:
        """Return the rows in memory, where `tokens` more may be written.

        Only of a tier that is `in_memory`.
        """
        return self.tier.rows(self.index, self.length, self.length + tokens)

    def count_appended(self, query: Tensor, sequence: int) -> None:
        """Count a token that kernels have stored, the sequence's first of query [B, Hq, n, D]."""
        if self.observes_next:
            self._observe(query[sequence, :, :1])
        self.count_stored()

    @property
    def observes_next(self) -> bool:
        """Whether the next token's query is observed, so that `count_stored` is not enough."""
        return self.key_scales.observes(self.length)

    def count_stored(self) -> None:
        """Count a token that kernels have stored, whose query is not observed."""
        self.tier.count_appended(self.index)
        self.residual_count += 1

    def quantise_oldest(self) -> None:
        """Quantise the pending groups of the residual, if any, from their original values."""
        count = self.pending_group_tokens
        if count:
            self.key_scales.fix(self.residual_keys)
            self._quantise(self.residual_keys[:, :count], self.residual_values[:, :count])
            kept = self._kv_rows[:, :, count : self.residual_count].clone()
            self.residual_count -= count
            self._kv_rows[:, :, : self.residual_count] = kept

    def move_residual(self, into: Tensor) -> None:
        """Move the residual to the buffer `into` [2, Hkv, R + g, D], free slots zeroed.

        The key scales must be fixed.
        """
        self.key_scales.forget_observed()
        self.claim_buffers(self.config)
        into.zero_()
        into[:, :, : self.residual_count] = self._kv_rows[:, :, : self.residual_count]
        self.kept, self._kv_rows = None, into  # `kept` first: it has the addresses of the old one

    def residual_at(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Read the residual, keys and values [Hkv, m, D], that a sequence cut to `length` needs.

        Returns `None` where the slow tier need not be read for it.

        Raises:
            SlowTierError: the slow tier cannot be read; nothing changed.
        """
        start = self.config.low_bit_length(length)
        return self.tier.read(self.index, start, length) if start < self.table.length and length < self.length else None

    def truncate(self, length: int, residual: tuple[Tensor, Tensor] | None) -> None:
        """Drop tokens from `length` on. `residual` is the result of `residual_at(length)`."""
        if length >= self.length:
            return
        if residual is not None:
            self.table.truncate(self.config.low_bit_length(length))
            for buffer, stored in zip(self._kv_rows, residual, strict=True):
                buffer[:, : stored.shape[1]] = stored
        self.residual_count = length - self.table.length
        self.key_scales.truncate(length)
        self.claim_buffers(self.config)
        self.row_fetcher.drop()
        self.next_positions = None
        self.tier.truncate_memory(self.index, length)

    def undo(self, length: int, next_positions: Tensor | None) -> None:
        """Undo an unfinished decode pass; `length` and `next_positions` are those before it.

        Usually the slow tier, which may have caused the failure, is not read: groups are quantised
        only after the pass has finished in every layer.
        """
        if self.config.low_bit_length(length) < self.table.length:  # it failed while they were quantised
            self.truncate(length, self.residual_at(length))
        self.residual_count = length - self.table.length
        self.key_scales.truncate(length)
        self.claim_buffers(self.config)
        self.row_fetcher.cancel()
        self.next_positions = next_positions

    def fork(self, tier: SlowTier, row_fetcher: RowFetcher, config: SpeCacheConfig) -> CompressedLayer:
        """Return a copy over `tier` (a fork of this layer's), with the same layout and pages."""
        other = CompressedLayer(self.index, config, self.table.fork(), tier, row_fetcher, self._kv_rows[0])
        other._kv_rows.copy_(self._kv_rows)
        other.residual_count = self.residual_count
        other.key_scales = self.key_scales.fork(self.key_scales.tokens)
        other.next_positions = self.next_positions
        other.claim_buffers(config)
        return other

    def use_tier(self, tier: SlowTier, row_fetcher: RowFetcher, config: SpeCacheConfig) -> None:
        """Switch to another tier with the same rows, and settings with the same layout.

        Prefetched rows are dropped.
        """
        self.row_fetcher.drop()
        self.kept = None  # first: it has the addresses of the old tier's rows
        self.tier, self.row_fetcher, self.config = tier, row_fetcher, config
        self.next_positions = None

    def can_truncate(self, length: int) -> bool:
        """Return whether the codes of the first `length` tokens equal those of a fresh prefill."""
        return length >= self.length or self.config.code is not Code.ROTATED or self.key_scales.survives(length)

    def restore(self, residual: Tensor, key_scales: KeyScales, next_positions: Tensor | None) -> None:
        """Restore a saved residual [2, Hkv, m, D], key scales and next positions.

        The page table and the slow tier must be filled already.
        """
        self.residual_count = residual.shape[2]
        self._kv_rows[:, :, : self.residual_count] = residual
        self.key_scales = key_scales
        self.next_positions = next_positions
        self.claim_buffers(self.config)

    def rebuild(self, length: int) -> None:
        """Rebuild low-bit copy and residual of the first `length` tokens from 16-bit rows."""
        for start in range(0, length, KEY_BLOCK):
            self._add(*self._stored(start, min(start + KEY_BLOCK, length), self._kv_rows.device))

    def release(self) -> None:
        self.row_fetcher.free()  # explicitly: a background read may still refer to the hot set
        self.table.truncate(0)
        self.residual_count = 0
        self.key_scales = KeyScales(self.key_scales.tokens)
        self.kept = None
        self._free()

    def _parts(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Iterator[Part]:
        length, joins = self.length, self.tier.in_memory and keys.device.type == "cpu"
        step = JOINED_ROWS if joins else KEY_BLOCK
        for start in range(0, length, step):  # no name refers to rows while the next are read
            yield attend_part(query, *self._stored(start, min(start + step, length), keys.device), params)
        yield attend_part(query, keys, values, params, causal=True)

    def _stored(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, stop - start, D] of stored tokens, on the device."""
        keys, values = self.tier.read(self.index, start, stop)
        return (keys, values) if keys.device == device else upload(keys, values, device)

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Add n prompt tokens, keys and values [Hkv, n, D]."""
        self.tier.write(self.index, self.length, keys, values)
        self._add(keys, values)

    def _add(self, keys: Tensor, values: Tensor) -> None:
        """Add n tokens to the residual, and quantise the oldest groups beyond `R`.

        New tokens are quantised where they lie. Only those of a group that began in the residual
        are copied first, and those of the prefix that the key scales are computed from.
        """
        held, n = self.residual_count, keys.shape[1]
        count = self.config.low_bit_length(self.length + n) - self.table.length
        if count:
            group = self.config.group_size
            copied = min(count, -(-held // group) * group)  # whole groups with tokens of the residual
            prefix = max(copied, 0 if self.key_scales.value is not None else self.key_scales.tokens)
            joined = self._joined(keys, values, prefix)
            self.key_scales.fix(joined[0])
            if copied:
                self._quantise(joined[0][:, :copied], joined[1][:, :copied])
            if copied < count:
                self._quantise(keys[:, copied - held : count - held], values[:, copied - held : count - held])
        kept = self._kv_rows[:, :, count:held].clone()  # what was not quantised moves to the front
        first = max(count - held, 0)  # of the new tokens in the residual
        self.residual_count = held + n - count
        for buffer, old, new in zip(self._kv_rows, kept, (keys, values), strict=True):
            buffer[:, : old.shape[1]] = old
            buffer[:, old.shape[1] : self.residual_count] = new[:, first:]

    def _joined(self, keys: Tensor, values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the first `tokens` of residual and new tokens, as many as there are, in a row."""
        new = max(tokens - self.residual_count, 0)
        return torch.cat([self.residual_keys, keys[:, :new]], dim=1), torch.cat([self.residual_values, values[:, :new]], dim=1)

    def _observe(self, query: Tensor) -> None:
        before = self.key_scales.observed_tokens
        self.key_scales.observe(self.length, query, self._kv_rows.shape[1])
        if self.key_scales.observed_tokens != before:
            self.claim_buffers(self.config)

    def _bytes(self, config: SpeCacheConfig, itemsize: int | None = None, scales_fixed: bool = True, growing: int = 0) -> FastBytes:
        _, heads, _, dim = self._kv_rows.shape
        return compressed_bytes(
            config,
            heads,
            dim,
            itemsize or self._kv_rows.itemsize,
            pages=len(self.table.pages),
            observed=self.key_scales.observed_tokens,
            slots=self.row_fetcher.slots,
            pairs=pairs_in_flight(config, self.table.length + growing),
            scales_fixed=scales_fixed,
        )

    def _quantise(self, keys: Tensor, values: Tensor) -> None:
        start, more = self.table.length, keys.shape[1]
        if pairs_in_flight(self.config, start + more) > pairs_in_flight(self.config, start):
            self.claim_buffers(self.config, more)
        self.table.extend(more)
        dispatch.quantise(keys, values, self.low_bit_kv, start)
