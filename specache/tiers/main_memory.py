"""What the RAM tiers of a GPU's cache share: page-locked memory and asynchronous copies into it."""

from __future__ import annotations

from specache.tiers.offload import StreamedOffload
from specache.tiers.pinned import PinnedPool
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowMemory
from specache.tiers.streams import Streams
from specache.tiers.transfer import HostMemory


class MainMemory:
    """Page-locked memory and offload of a cache. Created once per cache and shared with its forks.

    Args:
        memory: source of buffers; None is an unlimited pool of page-locked memory.

    Attributes:
        memory: the source of the tiers' blocks: one per layer, which a GPU reads by its address.
    """

    def __init__(self, streams: Streams, memory: HostMemory | None = None) -> None:
        self.memory = RowMemory(memory or PinnedPool(), block_tokens=None)
        self._offload = StreamedOffload(streams)

    def new_tier(self) -> RamTier:
        """Return an empty tier whose rows are copied through a hot set."""
        return RamTier(in_place=False, memory=self.memory, offload=self._offload)
