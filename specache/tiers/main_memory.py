"""What the RAM tiers of a cache on a GPU share: page-locked memory, and a way into it that nobody waits for."""

from __future__ import annotations

from specache.tiers.offload import StreamedOffload
from specache.tiers.pinned import PinnedPool
from specache.tiers.ram import RamTier
from specache.tiers.streams import Streams
from specache.tiers.transfer import HostMemory


class MainMemory:
    """Made once per cache; its forks have the same.

    Args:
        memory: where buffers come from; `None` is a pool of page-locked memory without a limit.
    """

    def __init__(self, streams: Streams, memory: HostMemory | None = None) -> None:
        self._memory = memory or PinnedPool()
        self._offload = StreamedOffload(streams)

    def new_tier(self) -> RamTier:
        """An empty tier for rows that are copied through a hot set."""
        return RamTier(in_place=False, pinned=True, memory=self._memory, offload=self._offload)
