"""The interface of a store of prefixes, as an engine uses it."""

from __future__ import annotations

from typing import Any, Protocol

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence


class StoredPrefixes(Protocol):
    """Stored prefixes of an engine's cache. Only the engine's thread calls it, between passes."""

    def take(self, owner: str, token_ids: list[int], cache: SpeCache) -> Sequence | None:
        """Return a sequence that belongs to `cache` and holds the longest stored prefix, or `None`.

        At least one token of the prompt is left to run.
        """

    def count(self, tokens: int) -> None:
        """Count a prompt that begins with so many stored tokens; 0 is none."""

    def add_running(self, owner: str, sequence: Sequence) -> None:
        """Let others reuse a prompt that was read, while its request decodes."""

    def keep(self, owner: str, sequence: Sequence) -> None:
        """Take over the sequence of a request that ended, or free it."""

    def drop_running(self, sequence: Sequence) -> None:
        """Forget a running sequence, which its owner frees."""

    def make_room(self, fast_bytes: int, slow_bytes: int) -> bool:
        """Drop prefixes, least recently used first, until so many bytes that are in use are free.

        Return whether they are.
        """

    def make_room_for_rows(self, nbytes: int) -> None:
        """Drop prefixes, least recently used first, until rows in memory may take so many more."""

    def status(self) -> Any:
        """Return what is stored. Any thread may call it."""

    def close(self) -> None:
        """Drop every prefix from memory."""
