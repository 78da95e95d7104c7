"""What a request reuses of stored prefixes, and what it leaves for later requests.

Only prompt tokens are shared. The keys and values of an answer were computed over low-bit pairs, so
that a prompt that contains it would be answered otherwise than after a prefill of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence
from specache.engine.stored_prefixes import StoredPrefixes
from specache.errors import FastMemoryError
from specache.planning.footprint import PlannedSequence

if TYPE_CHECKING:
    from specache.engine.room import Room


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
        self._taken: dict[tuple[int, ...], Sequence] = {}

    def prepare(self, cache: SpeCache, prompts: list[list[int]]) -> None:
        """Fork the stored prefixes of the prompts into `cache`, before anything makes room."""
        for ids in prompts:
            if tuple(ids) not in self._taken and (sequence := self._fork(cache, ids)) is not None:
                self._taken[tuple(ids)] = sequence

    def planned(self, prompts: list[list[int]], planned: list[PlannedSequence]) -> list[PlannedSequence]:
        """Return the plan of the prompts with the prefixes that are prepared."""
        stored = [self._taken.get(tuple(ids)) for ids in prompts]
        return [
            one if sequence is None or one.twin else PlannedSequence(one.prompt, one.new, stored=sequence.length)
            for one, sequence in zip(planned, stored, strict=True)
        ]

    def put_back(self, cache: SpeCache) -> None:
        """Free the prepared prefixes that no prompt has begun with."""
        while self._taken:
            _free(cache, self._taken.popitem()[1])

    def take(self, cache: SpeCache, token_ids: list[int]) -> Sequence | None:
        """Return a sequence of `cache` that begins a prompt, or `None`.

        It is the prepared one, or one that was read since.
        """
        sequence = self._taken.pop(tuple(token_ids), None) or self._fork(cache, token_ids)
        reused = 0 if sequence is None else sequence.length
        self.cached_tokens += reused
        if self._takes:
            self._store.count(reused)
        return sequence

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

    def _fork(self, cache: SpeCache, token_ids: list[int]) -> Sequence | None:
        """Return a fork of the longest stored prefix in `cache.sequences`, or `None`."""
        if not self._takes or cache.info.couples_rows:
            return None
        sequence = None
        with _optional("go on from a stored prefix"):
            self._room.detach()
            sequence = self._store.take(self._owner, token_ids, cache)
        if sequence is not None:
            cache.sequences.append(sequence)
        return sequence


def _free(cache: SpeCache, sequence: Sequence) -> None:
    if sequence in cache.sequences:
        cache.sequences.remove(sequence)
    sequence.clear()


@contextmanager
def _optional(what: str) -> Iterator[None]:
    """Go on without a stored prefix where an error or a lack of memory prevents it."""
    try:
        yield
    except FastMemoryError:
        pass
    except Exception as error:
        warnings.warn(f"Could not {what}, which costs time only: {error!r}", RuntimeWarning, stacklevel=4)
