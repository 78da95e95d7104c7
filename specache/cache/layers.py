"""The state of a full-attention layer of one sequence: compressed, or dense (policy `full`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specache.attention.dense import KEY_BLOCK, AttentionParams, Part, attend_part, merge, merge_each
from specache.config import Code, SpeCacheConfig
from specache.errors import NonFiniteError
from specache.kernels import dispatch
from specache.kernels.finite import all_finite
from specache.kernels.types import LowBitKV
from specache.low_bit.key_scales import KEY_WEIGHT_BYTES, KeyWeights
from specache.low_bit.pool import PageTable
from specache.platform.budget import ByteBudget
from specache.rows.fetch import Rows
from specache.tiers.base import SlowTier


def check_finite(keys: Tensor, values: Tensor, layer: int) -> None:
    """Reject NaN and infinity before anything is packed.

    Raises:
        NonFiniteError: names the layer.
    """
    for name, tensor in (("keys", keys), ("values", values)):
        if not all_finite(tensor):
            raise not_finite(layer, name)


def not_finite(layer: int, name: str = "keys or values") -> NonFiniteError:
    """What `check_finite` raises."""
    return NonFiniteError(
        f"The model produced NaN or infinity in the {name} of layer {layer}. Nothing of this step was kept. "
        "Check the weights, or run in a wider dtype (bfloat16 or float32 instead of float16)."
    )


class CompressedLayer:
    """A full-attention layer: low-bit copy in pages, exact residual, 16-bit rows in the slow tier.

    Args:
        index: the layer's number in the model.
        table: its (empty) page table, whose pool's budget bounds the rest of the layer too.
        tier, rows: the sequence's slow tier, and this layer's access to it in decode steps.
        keys: any key tensor [Hkv, n, D] of the layer, for heads, head dimension, dtype and device.
    """

    def __init__(self, index: int, config: SpeCacheConfig, table: PageTable, tier: SlowTier, rows: Rows, keys: Tensor) -> None:
        heads, _, dim = keys.shape
        self.index = index
        self.config = config
        self.table = table
        self.tier = tier
        self.rows = rows
        self.next_positions: Tensor | None = None
        self.residual_count = 0
        capacity = config.residual + config.group_size
        self.weights = KeyWeights(capacity)
        self._claim = table.pool.budget.claim(residual_bytes(heads, dim, capacity, keys.itemsize), "residuals and key weights")
        self._residual = torch.empty(2, heads, capacity, dim, dtype=keys.dtype, device=keys.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of its rows."""
        return self._residual.dtype

    @property
    def copy(self) -> LowBitKV:
        return self.table.copy(self.weights.value)

    @property
    def length(self) -> int:
        return self.table.length + self.residual_count

    @property
    def residual_keys(self) -> Tensor:
        return self._residual[0, :, : self.residual_count]

    @property
    def residual_values(self) -> Tensor:
        return self._residual[1, :, : self.residual_count]

    @property
    def pending_group_tokens(self) -> int:
        """Tokens at the front of the residual that are due to become low bit."""
        return self.config.low_bit_length(self.length) - self.table.length

    @property
    def fast_bytes(self) -> int:
        return self.table.nbytes + self._residual.nbytes + self.weights.nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes held of the budget: `fast_bytes`, what the weights are made from, and the hot set."""
        return self.table.nbytes + self._claim.size + self.rows.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's `[K | V]`, all KV heads, as it is stored."""
        return 2 * self._residual.shape[1] * self._residual.shape[3] * self._residual.itemsize

    @property
    def exact_bytes(self) -> int:
        """Of `fast_bytes`, those of unquantised rows, in the model's dtype."""
        return self._residual.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in an ordinary cache of a 16-bit dtype."""
        return 2 * 2 * self._residual.shape[1] * self._residual.shape[3]

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Exact attention of the next n prompt tokens, which are then stored (paper Algorithm 1).

        Earlier rows are read back from the slow tier block by block. query [Hq, n, D]; keys, values [Hkv, n, D].
        """
        check_finite(keys, values, self.index)
        self._observe(query)
        out, _ = merge([merge_each(self._parts(query, keys, values, params))], params.sinks)
        self._store(keys, values)
        return out

    def append(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take one token, query [Hq, 1, D], key and value [Hkv, 1, D], into the residual and the slow tier."""
        check_finite(keys, values, self.index)
        self._observe(query)
        self.tier.write(self.index, self.length, keys, values)
        self._residual[0, :, self.residual_count] = keys[:, 0]
        self._residual[1, :, self.residual_count] = values[:, 0]
        self.residual_count += 1

    def quantise_oldest(self) -> None:
        """Quantise the oldest group when the residual is full, once, from its original values."""
        count = self.pending_group_tokens
        if count:
            self.weights.fix(self.residual_keys)
            self._quantise(self.residual_keys[:, :count], self.residual_values[:, :count])
            kept = self._residual[:, :, count : self.residual_count].clone()
            self.residual_count -= count
            self._residual[:, :, : self.residual_count] = kept

    def move_residual(self, into: Tensor) -> None:
        """Keep the residual of a layer whose weights are fixed in `into` [2, Hkv, R + g, D] from now on, free slots zeroed."""
        self.weights.forget_observed()
        self._count()
        into.zero_()
        into[:, :, : self.residual_count] = self._residual[:, :, : self.residual_count]
        self._residual = into

    def residual_at(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [Hkv, m, D] of the residual of a sequence cut to `length`, where the slow tier must be read for them.

        Raises:
            SlowTierError: it cannot be read; nothing changed.
        """
        start = self.config.low_bit_length(length)
        return self.tier.read(self.index, start, length) if start < self.table.length and length < self.length else None

    def truncate(self, length: int, residual: tuple[Tensor, Tensor] | None) -> None:
        """Forget tokens from `length` on. `residual` (see `residual_at`) is what a fresh prefill of the rest would hold exactly."""
        if length >= self.length:
            return
        if residual is not None:
            self.table.truncate(self.config.low_bit_length(length))
            for mine, rows in zip(self._residual, residual, strict=True):
                mine[:, : rows.shape[1]] = rows
        self.residual_count = length - self.table.length
        self.weights.truncate(length)
        self.rows.drop()
        self.next_positions = None

    def undo(self, length: int, next_positions: Tensor | None) -> None:
        """Take back what an unfinished decode pass did; `length` and `next_positions` are from before it.

        The slow tier, which may be what failed, is not read: groups retire only when the pass is through every layer.
        """
        if self.config.low_bit_length(length) < self.table.length:  # it failed while they did
            self.truncate(length, self.residual_at(length))
        self.residual_count = length - self.table.length
        self.weights.truncate(length)
        self.rows.cancel()
        self.next_positions = next_positions

    def fork(self, tier: SlowTier, rows: Rows, config: SpeCacheConfig) -> CompressedLayer:
        """A copy over `tier` (a fork of this one's) under the same layout, sharing pages."""
        other = CompressedLayer(self.index, config, self.table.fork(), tier, rows, self._residual[0])
        other._residual.copy_(self._residual)
        other.residual_count = self.residual_count
        other.weights = self.weights.fork(self.weights.tokens)
        other.next_positions = self.next_positions
        other._count()
        return other

    def use_tier(self, tier: SlowTier, rows: Rows, config: SpeCacheConfig) -> None:
        """Go on over another tier that holds the same rows, under settings with the same layout. Nothing is on its way then."""
        self.rows.drop()
        self.tier, self.rows, self.config = tier, rows, config
        self.next_positions = None

    def can_truncate(self, length: int) -> bool:
        """Whether the codes of the first `length` tokens are those that a fresh prefill would make."""
        return length >= self.length or self.config.code is not Code.ROTATED or self.weights.survives(length)

    def restore(self, residual: Tensor, weights: KeyWeights, next_positions: Tensor | None) -> None:
        """Take over a saved residual [2, Hkv, m, D] and the rest; the page table and the slow tier are filled already."""
        self.residual_count = residual.shape[2]
        self._residual[:, :, : self.residual_count] = residual
        self.weights = weights
        self.next_positions = next_positions
        self._count()

    def rebuild(self, length: int) -> None:
        """Make the low-bit copy and the residual of the first `length` tokens from the 16-bit rows in the slow tier."""
        for start in range(0, length, KEY_BLOCK):
            keys, values = self.tier.read(self.index, start, min(start + KEY_BLOCK, length))
            self._take(keys.to(self._residual.device), values.to(self._residual.device))

    def release(self) -> None:
        self.rows.free()  # at once: a background read may still hold the hot set
        self.table.truncate(0)
        self.residual_count = 0
        self.weights = KeyWeights(self.weights.tokens)
        self._claim.release()

    def _parts(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Iterator[Part]:
        for stored_keys, stored_values in self._stored(keys.device):
            yield attend_part(query, stored_keys, stored_values, params)
        yield attend_part(query, keys, values, params, causal=True)

    def _stored(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """All stored keys and values, a block at a time."""
        length = self.length
        step = length if self.tier.in_place else KEY_BLOCK
        for start in range(0, length, max(step, 1)):
            keys, values = self.tier.read(self.index, start, min(start + step, length))
            yield keys.to(device), values.to(device)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        self.tier.write(self.index, self.length, keys, values)
        self._take(keys, values)

    def _take(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens to the residual, whose oldest groups become low bit."""
        keys = torch.cat([self.residual_keys, keys], dim=1)
        values = torch.cat([self.residual_values, values], dim=1)
        count = self.config.low_bit_length(self.table.length + keys.shape[1]) - self.table.length
        if count:
            self.weights.fix(keys)
            self._quantise(keys[:, :count], values[:, :count])
        self.residual_count = keys.shape[1] - count
        self._residual[0, :, : self.residual_count] = keys[:, count:]
        self._residual[1, :, : self.residual_count] = values[:, count:]

    def _observe(self, query: Tensor) -> None:
        self.weights.observe(self.length, query, self._residual.shape[1])
        self._count()

    def _count(self) -> None:
        """Hold bytes for the residual, the weights (also before they are fixed) and the queries they are made from."""
        _, heads, capacity, dim = self._residual.shape
        self._claim.resize(residual_bytes(heads, dim, capacity, self._residual.itemsize) + self.weights.observed_bytes)

    def _quantise(self, keys: Tensor, values: Tensor) -> None:
        start = self.table.length
        self.table.extend(keys.shape[1])
        dispatch.quantise(keys, values, self.copy, start)


def residual_bytes(heads: int, dim: int, capacity: int, itemsize: int) -> int:
    """What a `CompressedLayer` holds beside its pages: rows of `capacity` (`R + g`) tokens, and one float32 weight per channel."""
    return heads * dim * (2 * capacity * itemsize + KEY_WEIGHT_BYTES)


class DenseLayer:
    """A full-attention layer under policy `full`: the ordinary 16-bit cache, in fast memory."""

    def __init__(self, index: int, keys: Tensor, budget: ByteBudget) -> None:
        heads, _, dim = keys.shape
        self.index = index
        self.length = 0
        self._claim = budget.claim(0, "the 16-bit cache (policy 'full')")
        self._rows = torch.empty(2, heads, 0, dim, dtype=keys.dtype, device=keys.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    @property
    def keys(self) -> Tensor:
        return self._rows[0, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._rows[1, :, : self.length]

    @property
    def fast_bytes(self) -> int:
        return self._rows.nbytes

    @property
    def held_bytes(self) -> int:
        return self._claim.size

    @property
    def token_bytes(self) -> int:
        return 2 * 2 * self._rows.shape[1] * self._rows.shape[3]

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        check_finite(keys, values, self.index)
        parts = [attend_part(query, self.keys, self.values, params)] if self.length else []
        parts.append(attend_part(query, keys, values, params, causal=True))
        out, _ = merge(parts, params.sinks)
        self.extend(keys, values)
        return out

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Add n tokens [Hkv, n, D]."""
        needed = self.length + keys.shape[1]
        if needed > self._rows.shape[2]:
            capacity = dense_capacity(self.length, needed)
            size = self._rows.itemsize * 2 * self._rows.shape[1] * self._rows.shape[3] * capacity
            self._claim.resize(self._rows.nbytes + size)  # both, while one is copied into the other
            grown = self._rows.new_empty(*self._rows.shape[:2], capacity, self._rows.shape[3])
            grown[:, :, : self.length] = self._rows[:, :, : self.length]
            self._rows = grown
            self._claim.resize(size)
        self._rows[0, :, self.length : needed] = keys
        self._rows[1, :, self.length : needed] = values
        self.length = needed

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Exact attention of one new token [Hq, 1, D] -> [Hq, 1, D]."""
        check_finite(keys, values, self.index)
        self.extend(keys, values)
        return merge([attend_part(query, self.keys, self.values, params)], params.sinks)[0]

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def can_truncate(self, length: int) -> bool:
        return True

    def fork(self) -> DenseLayer:
        other = DenseLayer(self.index, self._rows[0], self._claim.budget)
        other._claim.resize(self._rows.nbytes)
        other._rows, other.length = self._rows.clone(), self.length
        return other

    def release(self) -> None:
        self.length = 0
        self._rows = self._rows[:, :, :0].clone()
        self._claim.release()


def dense_capacity(length: int, needed: int) -> int:
    """Tokens that a `DenseLayer` of `length` makes room for when its buffer is too small for `needed`."""
    return max(needed, length * 9 // 8)
