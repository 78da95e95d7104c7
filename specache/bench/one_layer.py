"""The attention of one decode step in one layer of one or several sequences (paper Algorithm 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from specache.attention.at_once import decode_at_once
from specache.attention.decode import StepKind, StepSpec, mixed_attention
from specache.bench.compute_device import CPU
from specache.bench.synthetic import copy_compressed, fill_compressed
from specache.cache.compressed_layer import CompressedLayer
from specache.cache.sizes import page_layout
from specache.config import PAGE_TOKENS, Code, Policy, SpeCacheConfig
from specache.kernels.types import AttentionParams
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from specache.rows.fetch import HotSetRowFetcher, InPlaceRowFetcher, RowFetcher
from specache.rows.native_hot_set import new_hot_set
from specache.stats import Counters
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowMemory, SystemMemory
from specache.tiers.transfer import Transfer
from specache.tiers.worker import PrefetchWorker


class LowBitLayer:
    """A layer whose oldest tokens are in the low-bit copy and whose newest 64 are in the residual.

    All 16-bit rows are in RAM. The CPU reads them in place. For a GPU every step copies all rows
    that it swaps in: none are kept, because the query never changes and would always find them.

    Args:
        keys, values: [Hkv, S, D], whole groups of tokens, on the device that computes.
        top_k: 16-bit pairs per KV head and row. None: that of `bits` and S.
        copied: copy rows on a CPU too. Default: only where keys and values are on a GPU.
        batch: sequences that hold these keys and values, each in memory of its own; on a GPU all
            read the 16-bit rows of the first, which takes as long.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, code: Code, bits: int, top_k: int | None, copied: bool | None = None, batch: int = 1
    ) -> None:
        heads, _, dim = keys.shape
        pairs: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
        self.config = SpeCacheConfig(code=code, bits=bits, residual=PAGE_TOKENS, **pairs)
        self._pool = PagePool(page_layout(self.config, heads, dim), keys.device, ByteBudget())
        on_cpu = keys.device.type == CPU
        copied = not on_cpu if copied is None else copied
        memory = None if on_cpu else RowMemory(SystemMemory(pinned=True), block_tokens=None)
        self.fetched = Counters()
        self.layers: list[CompressedLayer] = []
        for number in range(batch):
            shared = None if on_cpu or not number else self.layers[0]
            self.layers.append(self._layer(keys, values, copied, memory, shared))
        self.params = AttentionParams(scaling=dim**-0.5)
        self._top_k = self.config.selection
        self.newest = tuple(x[:, -1:].expand(batch, *x[:, -1:].shape) for x in (keys, values))  # [B, Hkv, 1, D]

    @property
    def nbytes(self) -> int:
        """Return the bytes of low-bit copies and residuals, which a step reads once."""
        return sum(layer.memory().fast for layer in self.layers)

    def attend(self, query: Tensor) -> Tensor:
        """Run the library's attention for query [B, Hq, n, D] -> float32 [B, Hq, n, D].

        The first row is the newest token (policy `on-demand`), which is decoded again. With two
        rows, the second one is a draft token with the same key and value (policy `verified`).
        """
        n = query.shape[2]
        kind, policy = (StepKind.SINGLE, Policy.ON_DEMAND) if n == 1 else (StepKind.PAIR, Policy.VERIFIED)
        keys, values = (newest.expand(-1, -1, n, -1) for newest in self.newest)
        plan = StepSpec(kind, policy, self._top_k, Counters())
        for layer in self.layers:
            layer.row_fetcher.drop()
            layer.residual_count -= 1
        out = decode_at_once(query.float(), keys, values, self.layers, self.params, plan)
        if out is not None:
            return out.transpose(1, 2)
        for layer in self.layers:
            layer.residual_count += 1
        return mixed_attention(query, keys, values, self.layers, self.params, plan)

    def _layer(
        self, keys: Tensor, values: Tensor, copied: bool, memory: RowMemory | None, shared: CompressedLayer | None
    ) -> CompressedLayer:
        """Return the layer of one sequence, with the rows of the layer `shared` if given."""
        tier = RamTier(not copied, memory)
        if shared is not None:
            assert isinstance(shared.tier, RamTier)
            tier = shared.tier
        tier.reserve(keys.shape[1] + 2 * PAGE_TOKENS)  # as many as a static step wants
        rows: RowFetcher = _copied_rows(tier, keys, self.fetched) if copied else InPlaceRowFetcher(tier, 0)
        layer = CompressedLayer(0, self.config, PageTable(self._pool), tier, rows, keys)
        if shared is None:
            fill_compressed(layer, tier, keys, values)
        else:
            copy_compressed(layer, shared)
        return layer


def _copied_rows(tier: RamTier, keys: Tensor, counters: Counters) -> HotSetRowFetcher:
    """Return row access that copies the rows of keys [Hkv, S, D] to the keys' device."""
    hot = new_hot_set(keys.shape[0], 2 * keys.shape[2], keys.dtype, keys.device)
    return HotSetRowFetcher(tier, 0, hot, PrefetchWorker(), Transfer(keys.device), counters)
