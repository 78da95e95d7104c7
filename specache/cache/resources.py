"""Resources that a cache and its forks share: fast memory, page pools and the transfer of rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from specache.cache.sizes import page_layout
from specache.config import SpeCacheConfig
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import PagePool, PageTable
from specache.model.dimensions import dimensions_of
from specache.model.info import ModelInfo
from specache.platform.budget import ByteBudget
from specache.tiers.row_memory import RowMemory
from specache.tiers.transfer import Transfer


class Resources:
    """The resources of a cache and its forks.

    Attributes:
        dimensions: the model's dimensions, from which working sets and hot sets are sized.
        budget: bounds all fast memory that is held.
        transfer: copies rows to the device.
        row_memory: memory of 16-bit rows on a CPU, in blocks that forks share.
    """

    def __init__(self, model: Any, info: ModelInfo, config: SpeCacheConfig) -> None:
        self.dimensions = dimensions_of(model, info)
        self.budget = ByteBudget(config.fast_memory)
        self._pools: dict[PageLayout, PagePool] = {}
        self.transfer = Transfer(info.device)
        self.row_memory = RowMemory()

    def page_table(self, config: SpeCacheConfig, keys: Tensor) -> PageTable:
        """Return an empty page table for a layer with keys [Hkv, n, D]."""
        layout = page_layout(config, keys.shape[0], keys.shape[2])
        if layout not in self._pools:
            self._pools[layout] = PagePool(layout, keys.device, self.budget)
        return PageTable(self._pools[layout])
