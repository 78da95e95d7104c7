"""The context of a cache's sequences: settings, fast memory, tiers and background threads.

A cache refers to its sequences and to its context, and sequences refer to the context. Nothing
refers back, so reference counts alone free a dropped cache at once.
"""

from __future__ import annotations

from torch import Tensor

from specache.cache.compressed_layer import CompressedLayer
from specache.cache.resources import Resources
from specache.cache.sizes import checkpoint_allowance, fetches, hot_slots, on_disk
from specache.config import SlowTierKind, SpeCacheConfig
from specache.model.info import ModelInfo
from specache.platform.step_threads import warn_of_cpu_limit
from specache.rows.fetch import HotSetRowFetcher, InPlaceRowFetcher, RowFetcher
from specache.rows.native_hot_set import new_hot_set
from specache.stats import Counters
from specache.tiers.base import SlowTier
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.main_memory import MainMemory
from specache.tiers.pinned import PinnedPool
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowMemory
from specache.tiers.streams import streams_for
from specache.tiers.worker import PrefetchWorker

DISK_READERS = 4  # threads, each of which reads the rows of one layer from disk


class CacheContext:
    """The state that a cache and its sequences share. A fork has its own.

    Args:
        main_memory: the main memory of the forked cache, if this is a fork.

    Attributes:
        expected_sequences: size of the batch that is being prefilled; it divides the hot set's
            bytes.
        living_sequences: sequences that exist now.
    """

    def __init__(
        self, info: ModelInfo, config: SpeCacheConfig, resources: Resources, main_memory: MainMemory | None = None
    ) -> None:
        if info.device.type == "cpu":
            warn_of_cpu_limit()
        self.info = info
        self.config = config
        self.resources = resources
        self.counters = _new_counters(config)
        self.expected_sequences = 0
        self.living_sequences = 0
        self.main_memory = main_memory or _new_main_memory(info, config)
        self._worker: PrefetchWorker | None = None

    def new_tier(self) -> SlowTier:
        """Return an empty slow tier of the configured kind."""
        if on_disk(self.config):
            assert self.config.slow_dir is not None, "checked by SpeCacheConfig"
            return DiskTier(self.config.slow_dir)
        if self.main_memory is not None:
            return self.main_memory.new_tier()
        return RamTier(self.config.slow_tier is SlowTierKind.RAM_INPLACE, self.resources.row_memory)

    @property
    def row_memory(self) -> RowMemory:
        """The memory of 16-bit rows, of this cache and its forks.

        Its `used` is what they hold of it, with shared blocks once.
        """
        return self.resources.row_memory if self.main_memory is None else self.main_memory.memory

    def row_fetcher(self, tier: SlowTier, index: int, keys: Tensor) -> RowFetcher:
        """Return the row fetcher of a layer with keys [Hkv, n, D]."""
        if not fetches(self.config):
            return InPlaceRowFetcher(tier, index)
        if self._worker is None:
            self._worker = PrefetchWorker(DISK_READERS if self.config.slow_tier is SlowTierKind.DISK else 1)
        hot = new_hot_set(keys.shape[0], 2 * keys.shape[2], keys.dtype, keys.device, self.resources.budget)
        return HotSetRowFetcher(tier, index, hot, self._worker, self.resources.transfer, self.counters)

    def hot_slots(self, tokens: int, layer: CompressedLayer) -> int:
        """Return a layer's hot-set slots per KV head, for a sequence of `tokens` tokens."""
        heads, _, dim = layer.residual_keys.shape
        return hot_slots(self.resources.dimensions, self.config, heads, dim, tokens, self._batch_size)

    def most_checkpoint_bytes(self, tokens: int) -> int:
        """Return the most bytes of window checkpoints for a sequence of `tokens` tokens."""
        return checkpoint_allowance(self.resources.dimensions, tokens, self._batch_size)

    @property
    def _batch_size(self) -> int:
        return max(self.living_sequences, self.expected_sequences)

    def fork(self, config: SpeCacheConfig) -> CacheContext:
        """Return the context of a fork of the cache, with its own settings."""
        return CacheContext(self.info, config, self.resources, self.main_memory)

    def count_from_zero(self) -> None:
        """Reset all counters."""
        self.counters = _new_counters(self.config)

    def count_anew(self) -> None:
        """Update what is counted after the settings changed."""
        counters = _new_counters(self.config)
        self.counters.prefetches, self.counters.speculates = counters.prefetches, counters.speculates

    def end_worker(self) -> None:
        """Cancel queued reads and end the background threads."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def forget_worker(self) -> None:
        """Drop the worker in a forked process, where its threads do not exist."""
        self._worker = None


def _new_counters(config: SpeCacheConfig) -> Counters:
    return Counters(prefetches=fetches(config) and config.policy.prefetches, speculates=config.policy.drafts)


def _new_main_memory(info: ModelInfo, config: SpeCacheConfig) -> MainMemory | None:
    if info.device.type != "cuda":
        return None
    return MainMemory(streams_for(info.device), PinnedPool(config.pinned_memory))
