"""The attention of one decode step in one layer and one sequence (paper Algorithm 3)."""

from __future__ import annotations

from torch import Tensor

from specache.attention.at_once import decode_at_once
from specache.attention.decode import StepKind, StepSpec, mixed_attention
from specache.bench.compute_device import CPU
from specache.bench.synthetic import fill_compressed
from specache.cache.layers import CompressedLayer
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
        top_k: 16-bit pairs per KV head and row.
        copied: copy rows on a CPU too. Default: only where keys and values are on a GPU.
    """

    def __init__(self, keys: Tensor, values: Tensor, code: Code, bits: int, top_k: int, copied: bool | None = None) -> None:
        heads, _, dim = keys.shape
        self.config = SpeCacheConfig(code=code, bits=bits, top_k=top_k, residual=PAGE_TOKENS)
        layout = page_layout(self.config, heads, dim)
        on_cpu = keys.device.type == CPU
        copied = not on_cpu if copied is None else copied
        tier = RamTier(not copied, None if on_cpu else RowMemory(SystemMemory(pinned=True), block_tokens=None))
        self.fetched = Counters()
        self._rows: RowFetcher = _copied_rows(tier, keys, self.fetched) if copied else InPlaceRowFetcher(tier, 0)
        self._table = PageTable(PagePool(layout, keys.device, ByteBudget()))
        self.layer = CompressedLayer(0, self.config, self._table, tier, self._rows, keys)
        self.params = AttentionParams(scaling=dim**-0.5)
        self._top_k = top_k
        self.newest = keys[:, -1:][None], values[:, -1:][None]  # [1, Hkv, 1, D]
        fill_compressed(self.layer, tier, keys, values)

    @property
    def nbytes(self) -> int:
        """Return the bytes of low-bit copy and residual, which a step reads once."""
        return self.layer.memory().fast

    def attend(self, query: Tensor) -> Tensor:
        """Run the library's attention for query [1, Hq, n, D] -> float32 [1, Hq, n, D].

        The first row is the newest token (policy `on-demand`), which is decoded again. With two
        rows, the second one is a draft token with the same key and value (policy `verified`).
        """
        n = query.shape[2]
        kind, policy = (StepKind.SINGLE, Policy.ON_DEMAND) if n == 1 else (StepKind.PAIR, Policy.VERIFIED)
        keys, values = (newest.expand(-1, -1, n, -1) for newest in self.newest)
        plan = StepSpec(kind, policy, self._top_k, Counters())
        self._rows.drop()
        self.layer.residual_count -= 1
        out = decode_at_once(query.float(), keys, values, [self.layer], self.params, plan)
        if out is not None:
            return out.transpose(1, 2)
        self.layer.residual_count += 1
        return mixed_attention(query, keys, values, [self.layer], self.params, plan)


def _copied_rows(tier: RamTier, keys: Tensor, counters: Counters) -> HotSetRowFetcher:
    """Return row access that copies the rows of keys [Hkv, S, D] to the keys' device."""
    hot = new_hot_set(keys.shape[0], 2 * keys.shape[2], keys.dtype, keys.device)
    return HotSetRowFetcher(tier, 0, hot, PrefetchWorker(), Transfer(keys.device), counters)
