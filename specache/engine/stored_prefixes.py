"""The interface of a store of prefixes, as an engine uses it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from enum import Enum
from typing import Any, Protocol

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence


class Unwritten(Enum):
    """What happens to a prefix that must leave memory before the disk has it."""

    WAIT = "the caller waits until it is written"
    QUEUE = "it is written in the background, and goes then (`RoomLater`)"
    DROP = "it is lost"


class RoomLater(Exception):
    """Bytes become free when a prefix is written. Ask again when it is (`call_when_written`)."""


class PrefixReturn(Protocol):
    """A stored prefix that a sequence gets from the disk, piece by piece.

    Attributes:
        length: its tokens.
    """

    length: int

    def pieces(self, sequence: Sequence) -> Generator[None, None, bool]:
        """Fill an empty sequence. Yield after every piece; the sequence must not be used meanwhile.

        Returns False, with the sequence empty again, if the prefix turns out to be unusable. The
        sequence is empty too if the generator is closed early.

        Raises:
            FastMemoryError, NoRoomError: there is no room; the sequence is empty.
        """


class StoredPrefixes(Protocol):
    """Stored prefixes of an engine's cache. Only the engine's thread calls it, between passes."""

    def begin(self, owner: str, token_ids: list[int], cache: SpeCache) -> Sequence | PrefixReturn | None:
        """Return the longest stored prefix of a prompt: in a sequence of `cache`, or still on disk.

        At least one token of the prompt is left to run.

        Raises:
            RoomLater: there is no room for it yet.
        """

    def count(self, tokens: int) -> None:
        """Count a prompt that begins with so many stored tokens; 0 is none."""

    def add_running(self, owner: str, sequence: Sequence) -> None:
        """Let others reuse a prompt that was read, while its request decodes."""

    def keep(self, owner: str, sequence: Sequence) -> None:
        """Take over the sequence of a request that ended, or free it."""

    def drop_running(self, sequence: Sequence) -> None:
        """Forget a running sequence, which its owner frees."""

    def make_room(self, fast_bytes: int, slow_bytes: int, unwritten: Unwritten) -> bool:
        """Drop prefixes, least recently used first, until so many bytes that are in use are free.

        Return whether they are.

        Raises:
            RoomLater: not yet (`Unwritten.QUEUE`).
        """

    def make_room_for_rows(self, nbytes: int, unwritten: Unwritten) -> bool:
        """Drop prefixes, least recently used first, until rows in memory may take so many more.

        Returns and raises as `make_room`.
        """

    def call_when_written(self, written: Callable[[], None]) -> None:
        """Call `written`, on another thread, whenever a prefix was written or failed to be."""

    def collect(self) -> None:
        """Take note of what was written since the last call, and have more written."""

    def status(self) -> Any:
        """Return what is stored. Any thread may call it."""

    def close(self) -> None:
        """Drop every prefix from memory."""
