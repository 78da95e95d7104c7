"""What a prefix store holds and has done, for the metrics and the status of a server."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PrefixCounters:
    """Running totals of a store.

    Attributes:
        hits, misses: prompts that reused a prefix, and that found none.
        cached_tokens: prompt tokens that were not read because they were stored.
        brought_back: hits that were brought back from the disk.
        evicted: prefixes that left memory to make room.
        dropped: those of them that were lost: the disk should have got them, and had not yet.
        written, failed_writes: prefixes written to the disk, and that could not be.
    """

    hits: int = 0
    misses: int = 0
    cached_tokens: int = 0
    brought_back: int = 0
    evicted: int = 0
    dropped: int = 0
    written: int = 0
    failed_writes: int = 0


@dataclass(frozen=True)
class PrefixStatus:
    """What a store holds now.

    Attributes:
        prefixes: texts stored in memory, without those that only running requests hold.
        tokens: tokens of all texts, also of running requests and on the disk. Shared ones count
            once.
        fast_bytes: fast memory of the stored sequences, shared pages once per sequence.
        slow_bytes: bytes of their 16-bit rows, shared ones in memory once.
        oldest_use: time of the least recent use, in seconds since 1970.
        saved: prefixes on the disk.
        disk_bytes: bytes of all prefixes on the disk.
        waiting_writes: prefixes that are being written, or wait for it.
        ignored: folders that cannot be used, with the reason.
        problem: why there is no folder, although one was asked for; or the last failed write.
    """

    prefixes: int = 0
    tokens: int = 0
    fast_bytes: int = 0
    slow_bytes: int = 0
    oldest_use: float | None = None
    saved: int = 0
    disk_bytes: int = 0
    waiting_writes: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    counters: PrefixCounters = field(default_factory=PrefixCounters)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON. Keys are stable."""
        return asdict(self)
