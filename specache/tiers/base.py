"""The interface of a slow tier: storage for the 16-bit rows of one sequence.

A row is `[K | V]` of one token and one KV head: `2 D` contiguous elements in the model's dtype, on
the CPU. Rows of a head lie in token order. Keys are stored after RoPE. One thread writes; `gather`
may be called from any thread meanwhile. Storage failures raise `SlowTierError`; a failed write
leaves the tier unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RowsInFlight(Protocol):
    """Rows whose read is in progress. Call `take` once, or `cancel`.

    If both are omitted, the memory being read into lives until the reads have ended.
    """

    @property
    def arrived(self) -> bool:
        """Return True if `take` would not block."""

    def take(self) -> Tensor:
        """Return the rows [M, 2 D], waiting for them. Raise what `SlowTier.gather` raises."""

    def cancel(self) -> None:
        """Discard the read."""


@dataclass(frozen=True)
class Gathered:
    """Rows in flight that have arrived already: they were copied at once."""

    rows: Tensor
    arrived: bool = True

    def take(self) -> Tensor:
        return self.rows

    def cancel(self) -> None:
        pass


class SlowTier(Protocol):
    """The 16-bit rows of one sequence, for all its full-attention layers."""

    in_place: bool  # attention reads the rows where they lie, so nothing is prefetched

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [Hkv, n, D] of tokens `[start, start + n)`; forget later tokens."""

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, stop - start, D] of a range of tokens."""

    def rows(self, layer: int) -> Tensor:
        """Return a layer's buffer [Hkv, capacity, 2 D], with room to grow.

        Only of a tier that is `in_place`.
        """

    def gather(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        """Return rows [M, 2 D] of M (KV head, position) pairs, in their order."""

    def begin(self, layer: int, heads: Tensor, positions: Tensor) -> RowsInFlight | None:
        """Start to gather rows and return at once; None if that would take a thread.

        Copies in memory complete at once.
        """

    def reserve(self, tokens: int) -> None:
        """Prepare for a sequence of this many tokens."""

    def fork(self) -> SlowTier:
        """Return an independent copy."""

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated."""

    def close(self) -> None:
        """Free everything. The tier is then empty and may be filled again."""
