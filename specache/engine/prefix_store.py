"""Prompts that were read, kept for those that begin alike.

`PrefixStore` finds the longest stored prefix of a prompt: among finished sequences, among those
that still decode, and on a disk. It hands out a fork of it. Least recently used ones make room for
requests.

All methods but `status` run on the thread that steps the engine, between two steps. A running
sequence that is forked must not be attached to a device batch: `take` detaches that of its cache,
and a caller with several caches detaches the others'.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from specache.cache.cache import SpeCache
from specache.cache.cache_context import CacheContext
from specache.cache.prefix_fork import fork_prefix, is_whole, read_tokens
from specache.cache.prefix_index import Found, PrefixIndex
from specache.cache.prefixes import tokens_of
from specache.cache.sequence import Sequence
from specache.cache.sizes import on_disk
from specache.config import Policy, SpeCacheConfig
from specache.engine.prefix_disk import PrefixDisk
from specache.engine.prefix_eviction import PrefixEviction
from specache.engine.prefix_return import ReturningPrefix, to_the_end
from specache.engine.prefix_status import PrefixCounters, PrefixStatus
from specache.engine.stored_prefixes import Unwritten
from specache.errors import FastMemoryError, SlowTierError
from specache.model.info import inspect_model
from specache.platform import modes
from specache.sessions.prefix_files import SavedPrefix, owner_digest
from specache.sessions.prefix_reading import NoRoomError
from specache.tiers.ram import held_bytes


class PrefixStore:
    """Stored prefixes of one model.

    Only tokens that were read from a prompt are reused, and at least `R + g` of them, so that an
    answer over a prefix is that of a prompt read afresh. No owner's lookup depends on what others
    have stored, but all share the memory: one's requests may evict another's prefixes.

    Args:
        model: the model that reads the prompts. It must not change.
        config: settings of the caches whose sequences are stored; those that the low-bit copy
            depends on must be the same in all of them.
        most_slow_bytes: the most bytes of 16-bit rows in memory, of stored and running sequences.
            Prefixes are evicted beyond them. None is unlimited.
        folder: where prompts that were read are also written, in the background, so that they are
            there after a restart. One process at a time has a folder: a second one is warned, and
            goes on without.
        most_disk_bytes: the most bytes in the folder. None is unlimited.
        share_owners: all owners see each other's prefixes.

    Raises:
        ConfigError: policy `full` keeps no rows that could be written to a folder.
    """

    def __init__(
        self,
        model: Any,
        config: SpeCacheConfig | None = None,
        *,
        most_slow_bytes: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        most_disk_bytes: int | None = None,
        share_owners: bool = False,
    ) -> None:
        info = inspect_model(model)
        self._config = (config or SpeCacheConfig()).resolved(info.device.type)
        self._most_slow_bytes = most_slow_bytes
        self._share_owners = share_owners
        self._context: CacheContext | None = None  # of one of the caches, which share their memory
        self._counters = PrefixCounters()
        self._index = PrefixIndex(info, self._config)
        self._disk: PrefixDisk | None = None
        if folder is not None:
            self._disk = PrefixDisk(model, self._config, self._index, self._counters, folder, most_disk_bytes)
        self._eviction = PrefixEviction(self._index, self._disk, self._counters)
        self._in_memory = PrefixStatus()
        self._refresh()

    def match(self, owner: str, token_ids: list[int]) -> int:
        """Return how many tokens of a prompt `take` would reuse. Nothing changes."""
        self._collect()
        found = self._index.best(self._key(owner), tokens_of(token_ids))
        return 0 if found is None else found[2]

    def take(self, owner: str, token_ids: list[int], cache: SpeCache) -> Sequence | None:
        """Return a sequence of `cache` that holds the longest stored prefix of a prompt, or None.

        It shares pages and rows with the stored one. At least one token of the prompt is left to
        run. Take it before `make_room`, which else may evict it. What is on the disk is brought
        back before this returns.
        """
        while (found := self._begin(owner, token_ids, cache, Unwritten.WAIT)) is not None:
            if isinstance(found, Sequence):
                return found
            try:
                if (sequence := self._bring_back(found, cache)) is not None:
                    return sequence
            except (FastMemoryError, NoRoomError):
                return None
        return None

    def begin(self, owner: str, token_ids: list[int], cache: SpeCache) -> Sequence | ReturningPrefix | None:
        """Return what `take` would begin with: a sequence, or a prefix that is still on the disk.

        Raises:
            RoomLater: a sequence finds no room before others are written.
        """
        return self._begin(owner, token_ids, cache, Unwritten.QUEUE)

    def count(self, tokens: int) -> None:
        """Count a prompt that began with so many stored tokens. It may have called `take` twice."""
        self._counters.hits += tokens > 0
        self._counters.misses += tokens == 0
        self._counters.cached_tokens += tokens

    def add_running(self, owner: str, sequence: Sequence) -> None:
        """Let others fork a sequence whose prompt was read, while its request runs.

        Call `keep` when the request ends.
        """
        self._collect()
        self._context = sequence.context
        for other in [other for other in self._index.running if not other.length]:  # freed without `keep`
            self._index.end_running(other)
        count = read_tokens(sequence)
        if count < self._index.least or not self._has_layout(sequence) or sequence in self._index.running:
            return
        prefix = self._index.entry(self._key(owner), tokens_of(sequence.token_ids[:count]))
        self._index.add_running(prefix, sequence)
        if self._disk is not None:
            with modes.ours():
                self._disk.write(prefix, sequence)

    def keep(self, owner: str, sequence: Sequence) -> None:
        """Take over the sequence of a request that ended, however it did.

        Its prompt, as far as it was read, is stored; the answer is cut off. What is not worth
        storing is freed. The caller must not use the sequence any more.
        """
        self._collect()
        self._context = sequence.context
        with modes.ours():
            try:
                stored = self._store(self._key(owner), sequence)
            except SlowTierError:
                stored = False
            self._index.end_running(sequence)
            if not stored:
                sequence.clear()
        self.make_room_for_rows(0, Unwritten.DROP)
        self._refresh()

    def drop_running(self, sequence: Sequence) -> None:
        """Forget a running sequence that its owner frees without `keep`."""
        self._index.end_running(sequence)

    def make_room(self, fast_bytes: int, slow_bytes: int, unwritten: Unwritten = Unwritten.WAIT) -> bool:
        """Evict least recently used prefixes until so many bytes are free that are in use now.

        Bytes that running requests share with a prefix stay in use, and those that prefixes share
        until the last of them goes. With a folder, those that are there go first.

        Args:
            unwritten: what happens to one that is worth writing and not there yet.

        Returns:
            whether so many bytes became free.

        Raises:
            RoomLater: they will, or some of them, when a prefix is written (`Unwritten.QUEUE`).
        """
        fast, slow = self._fast_bytes() - fast_bytes, self._slow_bytes() - slow_bytes

        def is_made() -> bool:
            return (fast_bytes <= 0 or self._fast_bytes() <= fast) and (slow_bytes <= 0 or self._slow_bytes() <= slow)

        return self._evict_until(is_made, unwritten)

    def make_room_for_rows(self, nbytes: int, unwritten: Unwritten = Unwritten.WAIT) -> bool:
        """Evict least recently used prefixes until rows may take so many bytes more in memory.

        Arguments, return value and errors are those of `make_room`.
        """
        most = self._most_slow_bytes
        return most is None or self._evict_until(lambda: self._slow_bytes() + nbytes <= most, unwritten)

    def call_when_written(self, written: Callable[[], None]) -> None:
        """Call `written`, on another thread, whenever a prefix was written or failed to be."""
        if self._disk is not None:
            self._disk.call_when_written(written)

    def collect(self) -> None:
        """Take note of what was written since the last call, and have more written."""
        self._collect()
        self._refresh()

    def status(self) -> PrefixStatus:
        """Return what is stored. Any thread may call this."""
        status = self._in_memory
        return status if self._disk is None else self._disk.status(status)

    def close(self, seconds: float = 10.0) -> None:
        """Free everything. Safe to call twice.

        Args:
            seconds: time for writing what is not in the folder yet.
        """
        with modes.ours():
            if self._disk is not None:
                self._disk.close(seconds)
            for prefix in self._index.in_memory():
                self._eviction.drop(prefix)
        self._index.clear()
        self._refresh()

    # Implementation

    def _key(self, owner: str) -> str:
        return owner_digest("" if self._share_owners else owner)

    def _collect(self) -> None:
        """Take note of what the disk's thread did since the last call."""
        if self._disk is not None:
            self._disk.collect()
            self._disk.catch_up()

    def _has_layout(self, sequence: Sequence) -> bool:
        """Return whether a sequence has the low-bit copy that others can share."""
        if self._config.policy is Policy.FULL:
            return not sequence.compressed
        layers = sequence.compressed.values()
        return bool(layers) and all(layer.config.layout == self._config.layout for layer in layers)

    def _begin(self, owner: str, token_ids: list[int], cache: SpeCache, unwritten: Unwritten) -> Sequence | ReturningPrefix | None:
        self._collect()
        self._context = cache.context
        cache.release_device_batch()
        key, text = self._key(owner), tokens_of(token_ids)
        disk = cache.config.policy is not Policy.FULL  # its caches hold no rows that could be brought back
        with modes.ours():
            while (found := self._index.best(key, text, disk)) is not None:
                prefix, source, length = found
                if isinstance(source, SavedPrefix):
                    assert self._disk is not None
                    self._touch(found)
                    return ReturningPrefix(self._disk, prefix, source, length)
                try:
                    sequence = self._fork(found, cache)
                except FastMemoryError:
                    if not self._eviction.evict_one(unwritten, sparing=prefix):
                        break
                    continue
                if sequence is not None:
                    self._touch(found)
                    return sequence
        return None

    def _bring_back(self, returning: ReturningPrefix, cache: SpeCache) -> Sequence | None:
        """Return a sequence with a prefix from the disk, or `None` if that is damaged.

        Raises:
            FastMemoryError, NoRoomError: there is no room, and nothing left to evict.
        """
        sequence = cache.new_sequence()
        row_bytes = returning.length * cache.resources.dimensions.stored_row_bytes
        with modes.ours():
            while True:
                try:
                    self.make_room_for_rows(row_bytes)
                    return sequence if to_the_end(returning.pieces(sequence)) else None
                except (FastMemoryError, NoRoomError):
                    if not self._eviction.evict_one(Unwritten.WAIT, sparing=returning.prefix):
                        raise

    def _fork(self, found: Found, cache: SpeCache) -> Sequence | None:
        """Return a fork of what was found, or None if it cannot be used and was forgotten."""
        prefix, source, length = found
        assert isinstance(source, Sequence)
        try:
            fork = fork_prefix(source, cache.context, length)
        except SlowTierError:
            fork = None
        if fork is None and prefix.sequence is source:
            self._eviction.drop(prefix)
        elif fork is None:
            self._index.end_running(source)
        return fork

    def _touch(self, found: Found) -> None:
        prefix, _, length = found
        self._index.touch(prefix)
        prefix.hits += 1
        if self._disk is not None:
            self._disk.touch(prefix, length)

    def _store(self, key: str, sequence: Sequence) -> bool:
        """Store a finished sequence unless it adds nothing. Return whether the store holds it."""
        if not self._has_layout(sequence) or not is_whole(sequence):
            return False
        sequence.truncate(read_tokens(sequence))
        if sequence.length < self._index.least:
            return False
        text = tokens_of(sequence.token_ids)
        if (other := self._index.holder(key, text)) is not None:
            self._index.touch(other)
            return False
        prefix = self._index.entry(key, text)
        self._index.own(prefix, sequence)
        for shorter in self._index.shorter(prefix):
            if shorter.sequence is not None and self._index.serves(sequence, len(shorter.text)):
                prefix.hits += shorter.hits
                self._eviction.drop(shorter)
        if self._disk is not None:
            self._disk.write_stored(prefix)
        return True

    def _evict_until(self, is_made: Callable[[], bool], unwritten: Unwritten) -> bool:
        """Evict prefixes until there is room; return whether there is."""
        if is_made():
            return True
        self._collect()
        try:
            with modes.ours():
                while not is_made() and self._eviction.evict_one(unwritten):
                    pass
        finally:
            self._refresh()
        return is_made()

    def _fast_bytes(self) -> int:
        """Return the bytes of fast memory in use."""
        return 0 if self._context is None else self._context.resources.budget.used

    def _slow_bytes(self) -> int:
        """Return the bytes of rows in memory, shared ones once; of rows on a disk the store's."""
        if self._context is not None and not on_disk(self._config):
            return self._context.row_memory.used
        return held_bytes(sequence.tier for sequence in self._stored())

    def _stored(self) -> list[Sequence]:
        """Return the sequences that the store owns."""
        return [prefix.sequence for prefix in self._index.in_memory() if prefix.sequence is not None]

    def _refresh(self) -> None:
        """Renew what `status` returns, which other threads read."""
        sequences = self._stored()
        self._in_memory = PrefixStatus(
            prefixes=len(sequences),
            tokens=self._index.tokens,
            fast_bytes=sum(sequence.held_bytes() for sequence in sequences),
            slow_bytes=held_bytes(sequence.tier for sequence in sequences),
            oldest_use=min((prefix.used for prefix in self._index.in_memory()), default=None),
            counters=self._counters,
        )
