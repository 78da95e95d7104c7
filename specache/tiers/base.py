"""The interface of a slow tier: the 16-bit rows of one sequence.

One row is `[K | V]` of one token and one KV head, `2 D` elements, contiguous. Rows of one head lie in token order. Keys are stored
after RoPE. Rows are in the model's dtype and on the CPU. One thread writes; `gather` may be called from any thread meanwhile.
Whatever the storage refuses is a `SlowTierError`; a write that failed has changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RowsInFlight(Protocol):
    """Rows that are being read while the caller does something else. Take them once, or cancel. Where both are forgotten, the
    memory that is read into lives until the reads have ended.
    """

    @property
    def arrived(self) -> bool:
        """Whether nothing has to be waited for."""

    def take(self) -> Tensor:
        """The rows [M, 2 D], waiting for them. Raises what `SlowTier.gather` does."""

    def cancel(self) -> None:
        """Nobody will ask for them."""


@dataclass(frozen=True)
class Gathered:
    """Rows in flight that have arrived: they were copied at once."""

    rows: Tensor
    arrived: bool = True

    def take(self) -> Tensor:
        return self.rows

    def cancel(self) -> None:
        pass


class SlowTier(Protocol):
    """Rows of one sequence, all its full-attention layers."""

    in_place: bool  # rows are read where they lie: nothing needs fetching ahead

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [Hkv, n, D] of tokens `[start, start + n)`; what was there from `start` on is forgotten."""

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, stop - start, D] of a range of tokens (prefill, rebuilding a residual)."""

    def rows(self, layer: int) -> Tensor:
        """All rows [Hkv, capacity, 2 D] of a layer where they lie, with room for more; only of a tier that is `in_place`."""

    def gather(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        """Rows [M, 2 D] of M (KV head, position) pairs, in their order."""

    def begin(self, layer: int, heads: Tensor, positions: Tensor) -> RowsInFlight | None:
        """Begin to gather and return at once; `None` where that takes a thread. What is a mere copy in memory is done at once."""

    def reserve(self, tokens: int) -> None:
        """Expect a sequence of this many tokens."""

    def fork(self) -> SlowTier:
        """An independent copy."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def close(self) -> None:
        """Free everything; the tier is empty then and may be filled again."""
