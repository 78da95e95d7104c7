"""A stored prefix that is brought back from the disk, piece by piece."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

from specache.cache.prefix_index import Prefix
from specache.cache.sequence import Sequence
from specache.sessions.prefix_files import SavedPrefix

if TYPE_CHECKING:
    from specache.engine.prefix_disk import PrefixDisk

_T = TypeVar("_T")


class ReturningPrefix:
    """The first tokens of a prefix on the disk, for a sequence of any cache of the store.

    Attributes:
        prefix, length: what is brought back, and how many of its tokens.
    """

    def __init__(self, disk: PrefixDisk, prefix: Prefix, saved: SavedPrefix, length: int) -> None:
        self.prefix = prefix
        self.length = length
        self._disk = disk
        self._saved = saved

    def pieces(self, sequence: Sequence) -> Generator[None, None, bool]:
        """Fill an empty sequence, piece by piece (`engine.stored_prefixes.PrefixReturn`)."""
        return self._disk.pieces(self._saved, sequence, self.length)


def to_the_end(pieces: Generator[None, None, _T]) -> _T:
    """Run all pieces at once and return the result."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: _T = end.value
            return result
