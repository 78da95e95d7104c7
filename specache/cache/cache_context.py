"""What the sequences of a cache need of it: settings, fast memory, tiers and background threads, without the sequences themselves.

A cache refers to its sequences and to its context, sequences refer to the context, and nothing refers back: a cache that is dropped
is freed at once, by reference counts alone.
"""

from __future__ import annotations

from torch import Tensor

from specache.cache.layers import CompressedLayer
from specache.cache.resources import Resources
from specache.cache.sizes import checkpoint_allowance, hot_slots
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.model.info import ModelInfo
from specache.rows.fetch import FetchedRows, InPlaceRows, Rows
from specache.rows.hot_set import HotSet
from specache.stats import Counters
from specache.tiers.base import SlowTier
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.main_memory import MainMemory
from specache.tiers.pinned import PinnedPool
from specache.tiers.ram import RamTier
from specache.tiers.streams import streams_for
from specache.tiers.worker import PrefetchWorker

DISK_READERS = 4  # layers whose rows are read from disk at a time


class CacheContext:
    """Shared by a cache and its sequences (`sequence.Owner`); a fork of the cache has its own.

    Args:
        main_memory: of the cache that this one is a fork of.

    Attributes:
        expected_sequences: of the batch that is being prefilled: the hot set's bytes are for all of them.
        living_sequences: those that were made and are not gone yet.
    """

    def __init__(
        self, info: ModelInfo, config: SpeCacheConfig, resources: Resources, main_memory: MainMemory | None = None
    ) -> None:
        self.info = info
        self.config = config
        self.resources = resources
        self.counters = _new_counters(config)
        self.expected_sequences = 0
        self.living_sequences = 0
        self.main_memory = main_memory or _new_main_memory(info, config)
        self._worker: PrefetchWorker | None = None

    def new_tier(self) -> SlowTier:
        """An empty slow tier of the configured kind."""
        if self.config.slow_tier is SlowTierKind.DISK and self.config.policy is not Policy.FULL:
            assert self.config.slow_dir is not None, "checked by SpeCacheConfig"
            return DiskTier(self.config.slow_dir)
        if self.main_memory is not None:
            return self.main_memory.new_tier()
        return RamTier(in_place=self.config.slow_tier is SlowTierKind.RAM_INPLACE)

    def rows(self, tier: SlowTier, index: int, keys: Tensor) -> Rows:
        """A decode step's access to the 16-bit rows of a layer with keys [Hkv, n, D]."""
        if tier.in_place or not (self.config.policy.verifies or self.config.policy.prefetches):
            return InPlaceRows(tier, index)
        if self._worker is None:
            self._worker = PrefetchWorker(DISK_READERS if self.config.slow_tier is SlowTierKind.DISK else 1)
        hot = HotSet(keys.shape[0], 0, 2 * keys.shape[2], keys.dtype, keys.device, self.resources.budget)
        return FetchedRows(tier, index, hot, self._worker, self.resources.transfer, self.counters)

    def hot_slots(self, tokens: int, layer: CompressedLayer) -> int:
        """Slots per KV head that the hot set's budget gives a layer of a sequence of so many tokens."""
        heads, _, dim = layer.residual_keys.shape
        return hot_slots(self.resources.dimensions, self.config, heads, dim, tokens, self._batch_size)

    def most_checkpoint_bytes(self, tokens: int) -> int:
        """Bytes that copies of the sliding windows at earlier lengths may take, of a sequence of so many tokens."""
        return checkpoint_allowance(self.resources.dimensions, tokens, self._batch_size)

    @property
    def _batch_size(self) -> int:
        return max(self.living_sequences, self.expected_sequences)

    def fork(self, config: SpeCacheConfig) -> CacheContext:
        """The context of a fork of the cache, with settings of its own."""
        return CacheContext(self.info, config, self.resources, self.main_memory)

    def count_from_zero(self) -> None:
        """Forget what was counted."""
        self.counters = _new_counters(self.config)

    def count_anew(self) -> None:
        """Count prefetches and guesses from now on as the settings, which changed, have it."""
        counters = _new_counters(self.config)
        self.counters.prefetches, self.counters.speculates = counters.prefetches, counters.speculates

    def end_worker(self) -> None:
        """Cancel the reads that have not begun and end the background threads."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def forget_worker(self) -> None:
        """In a process that was forked, where its threads are not."""
        self._worker = None


def _new_counters(config: SpeCacheConfig) -> Counters:
    copies = config.slow_tier is not SlowTierKind.RAM_INPLACE
    return Counters(prefetches=copies and config.policy.prefetches, speculates=config.policy.drafts)


def _new_main_memory(info: ModelInfo, config: SpeCacheConfig) -> MainMemory | None:
    if info.device.type != "cuda":
        return None
    return MainMemory(streams_for(info.device), PinnedPool(config.pinned_memory))
