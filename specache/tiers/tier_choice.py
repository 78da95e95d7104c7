"""The slow tier that `auto` chose, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specache.config import SlowTierKind


@dataclass(frozen=True)
class TierChoice:
    """The decision made before a prefill.

    Attributes:
        slow_tier: the chosen tier.
        slow_dir: its folder, on disk.
        needed_bytes: main memory that the batch needs with its 16-bit rows there, beside what is
            held already.
        free_bytes: main memory that was free beside the model; None if unknown.
        disk_bytes: size of the rows on disk.
        disk_free_bytes: free space on that disk.
    """

    slow_tier: SlowTierKind
    slow_dir: str | None
    needed_bytes: int
    free_bytes: int | None
    disk_bytes: int | None = None
    disk_free_bytes: int | None = None

    @property
    def on_disk(self) -> bool:
        return self.slow_tier is SlowTierKind.DISK

    @property
    def reason(self) -> str:
        """Return the reason as a clause."""
        if self.free_bytes is None:
            return "the system does not say how much memory is free"
        needed = f"with the 16-bit pairs in memory this needs {self.needed_bytes:,} bytes more"
        return f"{needed}, and {self.free_bytes:,} are free"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. Keys are stable."""
        return {**asdict(self), "slow_tier": str(self.slow_tier), "reason": self.reason}
