"""What a request reuses of stored prefixes, and what it leaves for later requests.

Only prompt tokens are shared. The keys and values of an answer were computed over low-bit pairs, so
that a prompt that contains it would be answered otherwise than after a prefill of its own.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence
from specache.engine.chunked_prefill import StopReading
from specache.engine.stored_prefixes import PrefixReturn, RoomLater, StoredPrefixes
from specache.errors import FastMemoryError
from specache.planning.footprint import PlannedSequence
from specache.platform.notices import warn_and_go_on
from specache.sessions.prefix_reading import NoRoomError

if TYPE_CHECKING:
    from specache.engine.room import Room

SLICE_S = 0.05  # seconds for which a prefix is brought back between two steps of those that run


class PrefixReuse:
    """The stored prefixes of one request. An error of the store costs it the prefix, nothing more.

    Args:
        owner: whose prefixes.
        room: the memory that the store shares with the engines.
        takes: whether the request may go on from a stored prefix.
        keeps: whether its prompts are stored for others.

    Attributes:
        cached_tokens: prompt tokens that were stored before and need not be read, so far.
    """

    def __init__(self, store: StoredPrefixes, owner: str, room: Room, takes: bool = True, keeps: bool = True) -> None:
        self.cached_tokens = 0
        self._room = room
        self._store = store
        self._owner = owner
        self._takes = takes
        self._keeps = keeps
        self._taken: dict[tuple[int, ...], Sequence | PrefixReturn] = {}

    def prepare(self, cache: SpeCache, prompts: list[list[int]]) -> None:
        """Fork the stored prefixes of the prompts into `cache`, before anything makes room.

        Those on the disk are noted.

        Raises:
            RoomLater: there is no room for one yet.
        """
        for ids in prompts:
            if tuple(ids) not in self._taken and (found := self._begin(cache, ids)) is not None:
                self._taken[tuple(ids)] = found

    def planned(self, prompts: list[list[int]], planned: list[PlannedSequence]) -> list[PlannedSequence]:
        """Return the plan of the prompts with the prefixes that are prepared.

        What is on the disk is planned as if it were read: it may turn out to be damaged.
        """
        stored = [self._taken.get(tuple(ids)) for ids in prompts]
        return [
            PlannedSequence(one.prompt, one.new, stored=found.length) if isinstance(found, Sequence) and not one.twin else one
            for one, found in zip(planned, stored, strict=True)
        ]

    def put_back(self, cache: SpeCache) -> None:
        """Free the prepared prefixes that no prompt has begun with."""
        while self._taken:
            found = self._taken.popitem()[1]
            if isinstance(found, Sequence):
                _free(cache, found)

    def take(self, cache: SpeCache, token_ids: list[int]) -> Generator[None, None, Sequence | None]:
        """Return a sequence of `cache` that begins a prompt, or `None`.

        It is the prepared one, or one that was read since. While it is brought back from the disk,
        this yields every `SLICE_S` seconds.
        """
        found = self._taken.pop(tuple(token_ids), None)
        if not isinstance(found, Sequence):  # else it was planned with what it holds, and there is no room to do without
            found = self._if_room(cache, token_ids, found)
        if found is None:
            found = self._begin_now(cache, token_ids)
        while found is not None and not isinstance(found, Sequence):
            found = yield from self._bring_back(cache, token_ids, found)
        reused = 0 if found is None else found.length
        self.cached_tokens += reused
        if self._takes:
            self._store.count(reused)
        return found

    def was_read(self, sequence: Sequence) -> None:
        """Let others go on from a sequence whose prompt has just been read."""
        if self._keeps:
            with _optional("share a prompt"), self._room.growth_reserved():
                self._store.add_running(self._owner, sequence)

    def end(self, sequence: Sequence) -> bool:
        """Leave a sequence to the store when its request ends. Return False if it must be freed."""
        if not self._keeps or not sequence.length:
            return False
        with _optional("keep a prompt"), self._room.growth_reserved():
            self._store.keep(self._owner, sequence)
            return True
        return False

    def drop(self, sequence: Sequence) -> None:
        """Have nobody go on from a sequence any more, which is freed next."""
        if self._keeps:
            with _optional("drop a prompt"):
                self._store.drop_running(sequence)

    def _begin_now(self, cache: SpeCache, token_ids: list[int]) -> Sequence | PrefixReturn | None:
        """Do as `_begin`, and go without a prefix for which there is no room.

        None was planned for this prompt, which is read in full then.
        """
        try:
            return self._if_room(cache, token_ids, self._begin(cache, token_ids))
        except RoomLater:
            return None

    def _if_room(
        self, cache: SpeCache, token_ids: list[int], found: Sequence | PrefixReturn | None
    ) -> Sequence | PrefixReturn | None:
        """Return a prefix if a prompt has room that goes on from it. Otherwise free it: `None`.

        It was planned as if it were read in full. A fork may hold bytes that nobody planned.
        """
        if found is None:
            return None
        more = self._room.more_than_planned(cache, len(token_ids), found.length)
        if (not more and not isinstance(found, Sequence)) or self._room.holds(more):
            return found
        if isinstance(found, Sequence):
            _free(cache, found)
        return None

    def _begin(self, cache: SpeCache, token_ids: list[int]) -> Sequence | PrefixReturn | None:
        """Return a fork of the longest stored prefix in `cache.sequences`, one on disk, or `None`.

        Raises:
            RoomLater: there is no room for it yet.
        """
        if not self._takes or cache.info.couples_rows:
            return None
        found = None
        with _optional("go on from a stored prefix"):
            self._room.detach()
            found = self._store.begin(self._owner, token_ids, cache)
        if isinstance(found, Sequence):
            cache.sequences.append(found)
        return found

    def _bring_back(
        self, cache: SpeCache, token_ids: list[int], found: PrefixReturn
    ) -> Generator[None, None, Sequence | PrefixReturn | None]:
        """Return a sequence of `cache` with a prefix from the disk.

        If it is damaged or was removed, return the next best one; without room for it, `None`.
        """
        sequence, outcome, is_kept = cache.new_sequence(), None, False
        cache.sequences.append(sequence)  # its bytes are those of the request from the first piece on
        try:
            with _optional("bring back a stored prefix"):
                outcome = yield from _in_slices(found.pieces(sequence))
            if outcome:
                yield  # the rest is read in the next steps
                is_kept = True
        finally:
            if not is_kept:
                _free(cache, sequence)
        return sequence if is_kept else self._begin_now(cache, token_ids) if outcome is False else None


def _in_slices(pieces: Generator[None, None, bool]) -> Generator[None, None, bool]:
    """Run pieces to the end and return their result. Yield every `SLICE_S` seconds."""
    with closing(pieces):
        until = time.monotonic() + SLICE_S
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return bool(end.value)
            if time.monotonic() >= until:
                yield
                until = time.monotonic() + SLICE_S


def _free(cache: SpeCache, sequence: Sequence) -> None:
    if sequence in cache.sequences:
        cache.sequences.remove(sequence)
    sequence.clear()


@contextmanager
def _optional(what: str) -> Iterator[None]:
    """Go on without a stored prefix where an error or a lack of memory prevents it."""
    try:
        yield
    except (FastMemoryError, NoRoomError):
        pass
    except (RoomLater, StopReading):
        raise
    except Exception as error:
        warn_and_go_on(f"Could not {what}, which costs time only: {error!r}", stacklevel=4)
