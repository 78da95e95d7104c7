"""Which stored prefixes leave memory, and what happens to those that the disk lacks."""

from __future__ import annotations

from specache.cache.prefix_index import Prefix, PrefixIndex
from specache.engine.prefix_disk import PrefixDisk
from specache.engine.prefix_status import PrefixCounters
from specache.engine.stored_prefixes import RoomLater, Unwritten


class PrefixEviction:
    """Frees sequences that a store owns.

    Args:
        index, disk, counters: of the store.
    """

    def __init__(self, index: PrefixIndex, disk: PrefixDisk | None, counters: PrefixCounters) -> None:
        self._index, self._disk, self._counters = index, disk, counters

    def drop(self, prefix: Prefix) -> None:
        """Give up the sequence that the store has of a prefix."""
        sequence, prefix.sequence = prefix.sequence, None
        if sequence is not None and self._disk is not None:
            self._disk.free(sequence)
        elif sequence is not None:
            sequence.clear()
        self._index.remove_if_empty(prefix)

    def evict_one(self, unwritten: Unwritten, sparing: Prefix | None = None) -> bool:
        """Drop a sequence of the store; return whether there was one.

        It is the least recently used one of those that the disk has, or does not need. If there is
        none, `unwritten` says what happens.

        Raises:
            RoomLater: one is being written (`Unwritten.QUEUE`).
        """
        victims, disk = [prefix for prefix in self._index.in_memory() if prefix is not sparing], self._disk
        victim = next((one for one in victims if disk is None or disk.has_all(one)), None)
        if victim is None and disk is not None:
            victim = self._unwritten_victim(disk, victims, unwritten)
            if victim is None:
                return unwritten is Unwritten.DROP and disk.drop_write()
        if victim is None:
            return False
        self.drop(victim)
        self._counters.evicted += 1
        return True

    def _unwritten_victim(self, disk: PrefixDisk, victims: list[Prefix], unwritten: Unwritten) -> Prefix | None:
        """Return which of several prefixes goes that the disk lacks, least recently used first."""
        if unwritten is Unwritten.QUEUE:
            if victims and not disk.is_writing:
                disk.begin_writing(victims[0])
            if disk.is_writing:
                raise RoomLater
            return None
        free = [one for one in victims if not disk.is_read(one.sequence)]
        victim = next(iter([*free, *victims] if unwritten is Unwritten.DROP else victims), None)
        if victim is not None and unwritten is Unwritten.WAIT:
            disk.write_now(victim)
        elif victim is not None:
            disk.drop_write(victim)
            disk.count_dropped(victim)
        return victim
