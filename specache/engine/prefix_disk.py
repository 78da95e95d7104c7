"""The disk side of a prefix store: what is written, what is brought back, and what goes.

Its methods run on the engine's thread, except `status`. Files are written and removed by a thread
of its own (`prefix_writer`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from specache.cache.prefix_fork import fork_aside, has_whole_windows
from specache.cache.prefix_index import Prefix, PrefixIndex
from specache.cache.prefixes import common_tokens
from specache.cache.sequence import Sequence
from specache.config import Policy, SpeCacheConfig
from specache.engine.prefix_status import PrefixCounters, PrefixStatus
from specache.engine.prefix_writer import PrefixWriter
from specache.errors import ConfigError, FastMemoryError, SessionError, SlowTierError
from specache.platform.notices import warn_and_go_on
from specache.sessions.identity import identify
from specache.sessions.prefix_files import SavedPrefix, Stopped
from specache.sessions.prefix_folder import PrefixFolder, problems

WORTH_WRITING = 256  # tokens that are not on the disk yet


class PrefixDisk:
    """Prefixes in a folder.

    Args:
        index: gets the prefixes that are there.
        counters: of the store.
        folder, most_bytes: as `PrefixStore` has them.

    Attributes:
        problem: why there is no folder, or why the last write failed.

    Raises:
        ConfigError: policy `full`.
    """

    def __init__(
        self,
        model: Any,
        config: SpeCacheConfig,
        index: PrefixIndex,
        counters: PrefixCounters,
        folder: str | os.PathLike[str],
        most_bytes: int | None,
    ) -> None:
        if config.policy is Policy.FULL:
            raise ConfigError("policy='full' keeps no 16-bit rows that could be written as prefixes. Leave the folder out.")
        self._index, self._counters = index, counters
        self._behind = False  # whether some could not be written when they were read
        self._failed: WeakSet[Prefix] = WeakSet()  # could not be written, and go when memory is needed
        self.problem: str | None = None
        self._folder: PrefixFolder | None = None
        self._writer: PrefixWriter | None = None
        self._seen_removals = 0
        try:
            self._folder = PrefixFolder(folder, identify(model), config, most_bytes)
        except SessionError as error:
            self._report(f"Prefixes are kept in memory only. {error}")
            return
        self._writer = PrefixWriter(self._folder)
        self._seen_removals = self._folder.removals
        for saved in self._folder.saved:
            self._index.entry(saved.owner, saved.text, saved.used).saved = saved

    def write(self, prefix: Prefix, sequence: Sequence) -> None:
        """Write a prefix in the background, unless most of it is on the disk already.

        Where too many wait now, it is written when none does, if the store has it then.
        """
        writer = self._writer
        if writer is None or not self._is_worth_writing(prefix) or writer.has(prefix):
            return
        if writer.is_full:
            self._behind = True
            return
        try:
            fork = fork_aside(sequence, len(prefix.text))
        except (FastMemoryError, SlowTierError) as error:
            self._counters.failed_writes += 1
            self._report(f"A prefix of {len(prefix.text):,} tokens was not written to the disk: {error}")
            return
        if fork is not None:
            writer.write(prefix, fork, owned=True)

    def write_stored(self, prefix: Prefix) -> None:
        """Write a prefix of the store in the background, now or when fewer wait."""
        if self._writer is not None and self._writer.is_full:
            self._behind = True
        else:
            self.begin_writing(prefix)

    @property
    def is_writing(self) -> bool:
        """Return whether a prefix is being written, or waits for it."""
        return self._writer is not None and self._writer.waiting > 0

    def has_all(self, prefix: Prefix) -> bool:
        """Return whether nothing worth writing is lost if a prefix of the store goes now."""
        if self._writer is None or prefix in self._failed:
            return True
        return not self._writer.has(prefix) and not self._is_to_be_written(prefix)

    def begin_writing(self, prefix: Prefix) -> None:
        """Write the sequence that the store has of a prefix, in the background, if it is worth it.

        The store keeps it, and asks `free` to clear it.
        """
        writer = self._writer
        if writer is not None and not writer.has(prefix) and self._is_to_be_written(prefix):
            assert prefix.sequence is not None
            writer.write(prefix, prefix.sequence, owned=False)

    def write_now(self, prefix: Prefix) -> None:
        """Wait until a prefix of the store is on the disk, if it is worth writing."""
        self.begin_writing(prefix)
        if self._writer is not None:
            self._writer.wait_for(prefix)
            self.collect()

    def free(self, sequence: Sequence) -> None:
        """Clear a sequence that the store owned: at once, or when it was written."""
        if self._writer is None or not self._writer.release(sequence):
            sequence.clear()

    def is_read(self, sequence: Sequence | None) -> bool:
        """Return whether a sequence is being written now, so that it is not free at once."""
        return self._writer is not None and self._writer.reads(sequence)

    def drop_write(self, prefix: Prefix | None = None) -> bool:
        """Give up writing a prefix, or the one that was asked for last (`PrefixWriter.cancel`)."""
        return self._writer is not None and self._writer.cancel(prefix)

    def count_dropped(self, prefix: Prefix) -> None:
        """Count a prefix that leaves memory before the disk has it."""
        self._counters.dropped += 1
        self._report("A stored prompt was dropped before it was on the disk: running requests needed its memory.")

    def call_when_written(self, written: Callable[[], None]) -> None:
        """Call a function on the writer's thread whenever a write has ended."""
        if self._writer is not None:
            self._writer.wake = written

    def pieces(self, saved: SavedPrefix, sequence: Sequence, length: int) -> Generator[None, None, bool]:
        """Fill an empty sequence with the first tokens of a saved prefix. Yield after each piece.

        Returns False if it is damaged or was removed; it is not used any more then.

        Raises:
            FastMemoryError, NoRoomError: there is no room.
        """
        assert self._folder is not None
        is_there = False
        try:
            is_there = yield from self._folder.pieces(saved, sequence, length)
        except (SessionError, SlowTierError) as error:
            self._report(f"A stored prefix cannot be used and is read again. {error}")
        if is_there:
            self._counters.brought_back += 1
        else:
            self.collect()
        return is_there

    def touch(self, prefix: Prefix, length: int) -> None:
        """Count what the disk has of the first tokens of a prefix as used now."""
        saved = self._index.saved_like(prefix.owner, prefix.text[:length])
        if self._folder is not None and isinstance(saved, SavedPrefix):
            self._folder.touch(saved)

    def collect(self) -> None:
        """Enter into the index what was written and removed since the last call."""
        if self._writer is None or self._folder is None:
            return
        for written in self._writer.ended():
            if written.saved is not None:
                self._counters.written += 1
                self._failed.discard(written.prefix)
                self._enter(written.prefix, written.saved)
            elif not isinstance(written.error, Stopped):
                self._counters.failed_writes += 1
                self._failed.add(written.prefix)
                self._report(f"A prefix of {len(written.prefix.text):,} tokens was not written to the disk: {written.error}")
            self._index.remove_if_empty(written.prefix)
        if self._seen_removals != self._folder.removals:
            self._seen_removals = self._folder.removals
            for prefix in self._index:
                if prefix.saved is not None and prefix.saved.gone:
                    prefix.saved = None
                    self._index.remove_if_empty(prefix)

    def catch_up(self) -> None:
        """Write the newest prefix of the store that could not be written when it was read."""
        if not self._behind or self._writer is None or self._writer.is_full or self._writer.waiting:
            return
        for prefix in reversed(self._index.in_memory()):
            if not self.has_all(prefix):
                return self.begin_writing(prefix)
        self._behind = False

    def status(self, status: PrefixStatus) -> PrefixStatus:
        """Return a status with what is on the disk. Any thread may call this."""
        folder, writer = self._folder, self._writer  # another thread may be closing it
        if folder is None or writer is None:
            return replace(status, problem=self.problem)
        waiting = writer.waiting  # asked first: what does not wait any more is among the saved ones
        return replace(
            status,
            saved=len(folder.saved),
            disk_bytes=folder.nbytes,
            waiting_writes=waiting,
            ignored=problems(list(folder.ignored)),
            problem=self.problem,
        )

    def close(self, seconds: float) -> None:
        """Write what the index has in memory and the disk lacks, as far as there is time."""
        writer, folder = self._writer, self._folder
        if writer is None or folder is None:
            return
        self.collect()
        for prefix in reversed(self._index.in_memory()):
            self.begin_writing(prefix)
        writer.close(seconds)
        self.collect()
        self._writer = None
        folder.close()

    def _is_to_be_written(self, prefix: Prefix) -> bool:
        sequence = prefix.sequence
        return sequence is not None and has_whole_windows(sequence) and self._is_worth_writing(prefix)

    def _is_worth_writing(self, prefix: Prefix) -> bool:
        """Return whether the disk lacks much of a prefix, also after the writes under way."""
        there = self._index.saved_tokens(prefix.owner, prefix.text)
        for other in self._writer.pending() if self._writer is not None else []:
            if other.owner == prefix.owner:
                there = max(there, common_tokens(other.text, prefix.text))
        return len(prefix.text) - there >= WORTH_WRITING

    def _enter(self, prefix: Prefix, saved: SavedPrefix) -> None:
        """Enter a written prefix, and remove those on the disk that it makes unnecessary."""
        assert self._writer is not None
        entry = self._index.entry(prefix.owner, prefix.text, prefix.used) if prefix.is_empty else prefix
        entry.saved = saved
        for shorter in self._index.shorter(entry):
            if isinstance(shorter.saved, SavedPrefix) and self._index.serves(saved, len(shorter.text)):
                self._writer.remove(shorter.saved)
                shorter.saved = None
                self._index.remove_if_empty(shorter)

    def _report(self, problem: str) -> None:
        self.problem = problem
        warn_and_go_on(problem, stacklevel=2)
