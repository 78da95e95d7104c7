"""The slow tier that `auto` took, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specache.config import SlowTierKind


@dataclass(frozen=True)
class TierChoice:
    """What was decided before a prefill.

    Attributes:
        slow_tier: the tier that was taken.
        slow_dir: its folder, on disk.
        needed_bytes: main memory that the batch needs with its 16-bit rows there, beside what is held already.
        free_bytes: main memory that was free beside the model; `None` where the system does not tell.
        disk_bytes: what the rows take on disk.
        disk_free_bytes: what was free there.
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
        """Say why in half a sentence."""
        if self.free_bytes is None:
            return "the system does not say how much memory is free"
        needed = f"with the 16-bit pairs in memory this needs {self.needed_bytes:,} bytes more"
        return f"{needed}, and {self.free_bytes:,} are free"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Keys are stable."""
        return {**asdict(self), "slow_tier": str(self.slow_tier), "reason": self.reason}
